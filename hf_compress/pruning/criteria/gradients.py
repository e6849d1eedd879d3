"""Scores from the gradients of the training loss, averaged over optimizer steps.

A gate of 1 in front of whatever reads a unit multiplies all that the unit passes on, so d loss / d gate is the sum of
weight * gradient over the weights of any of the unit's layers, and minus that is what the loss changes to first order
when the unit goes.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from hf_compress.pruning.method import GATED, AveragedMethod, Evidence, MethodOptions, averaged_criterion
from hf_compress.registry import criteria


@averaged_criterion("taylor", reads="gate_gradients", structures=GATED)
def taylor(evidence: Evidence) -> Tensor:
    """First-order change of the loss when a unit goes: ``|d loss / d gate|``, that is ``|sum of w * g|``.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8 (absolute value instead of the square).
    """
    return evidence.gate_gradients().abs()


@averaged_criterion("taylor2", reads="gate_gradients", structures=GATED)
def taylor2(evidence: Evidence) -> Tensor:
    """The square of the first-order change: ``(d loss / d gate)^2``.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8.
    """
    return evidence.gate_gradients().square()


@averaged_criterion("fisher", reads="gate_gradients", structures=GATED)
def fisher(evidence: Evidence) -> Tensor:
    """Second-order change of the loss: ``(d loss / d gate)^2 / 2``, the diagonal of the empirical Fisher information.

    While training, the gradient is that of a whole optimizer step, not of single examples as in the source: gates see
    sums over all that a step computes. So this is half of ``taylor2`` there and ranks units as it does; with large
    batches the noise that the information is made of averages out, and steps of a single example are the source's.
    ``prune_oneshot`` squares the gradient of each example, as the source does.

    Source: Theis et al. 2018, arXiv:1801.05787, eq. 4; Kwon et al. 2022, arXiv:2204.09656, eq. 4.
    """
    return evidence.gate_gradients().square() / 2


@averaged_criterion("taylor_weights", reads="weight_gradients")
def taylor_weights(evidence: Evidence) -> Tensor:
    """Squared first-order change of each single weight, summed over the unit: ``sum of (w * g)^2``.

    Unlike ``taylor``, changes of opposite sign within a unit do not cancel. The gradients are those that the optimizer
    gets, after clipping.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 7 on single weights, added up.
    """
    return (evidence.weights() * evidence.weight_gradients()).square().sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class GrainOptions(MethodOptions):
    """Options of ``grain``."""

    alpha: float = 0.3
    """How empty a layer must be before its units count for less: below this density, about."""

    def _validate(self) -> None:
        self._check_number("alpha", 0, 100, open_low=True)


@criteria.register("grain")
class Grain(AveragedMethod):
    """First-order importance, less in layers of which little is left: ``|d loss / d gate| * tanh(density / alpha)``.

    Small layers empty themselves and vanish whole, which is what makes a model faster. The source averages with a
    decay of 0.998 over some ten thousand steps (``score_decay``), and takes the gradients of the loss of logits alone:
    ``PruningConfig(gradients="distillation")``.

    Options: see ``GrainOptions``.

    Source: Yang et al. 2023, arXiv:2212.00098 (GRAIN), section 3.
    """

    options = GrainOptions
    reads = frozenset({"gate_gradients"})
    structures = GATED

    def measure(self, evidence: Evidence) -> Tensor:
        """Return the magnitude of the gate gradients."""
        return evidence.gate_gradients().abs()

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the average, damped by the density of the layer."""
        return super().score(name, evidence) * math.tanh(evidence.density() / self.settings.alpha)
