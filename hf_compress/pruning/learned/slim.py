"""Network slimming: a learned factor for each unit, which a penalty pushes to zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.pruning.criteria.activations import UNITS
from hf_compress.pruning.learned.adam import adam_step, told_apart
from hf_compress.pruning.method import DeferringMethod, Evidence, MethodOptions
from hf_compress.registry import criteria


@dataclass(frozen=True, kw_only=True)
class SlimOptions(MethodOptions):
    """Options of ``slim``."""

    learning_rate: float = 1e-2
    """Of the factors, by Adam."""

    regular_scale: float = 1e-3
    """Weight of the penalty, the sum of the magnitudes of all factors."""

    def _validate(self) -> None:
        self._check_number("learning_rate", 0, 10, open_low=True)
        self._check_number("regular_scale", 0, 1e6)


@criteria.register("slim")
class Slim(DeferringMethod):
    """A factor for each unit, 1 at first, is trained with an L1 penalty; the score is its magnitude.

    The units go at the end of the schedule, all at once; then the factors stand still, and after training they are
    folded into the weights that read the units.

    Options: see ``SlimOptions``.

    Source: Liu et al. 2017, arXiv:1708.06519, eq. 1; the factors are those of gates instead of batch norms.
    """

    options = SlimOptions
    reads = frozenset({"gate_gradients"})
    structures = UNITS

    def start(self, name: str, evidence: Evidence) -> None:
        """Begin at 1."""
        self.tensors[name] = torch.ones(evidence.num_units, device=evidence.weights().device)

    def step(self, name: str, evidence: Evidence) -> None:
        """Move the factors."""
        if not self.over:
            factors = self.tensors[name]
            gradient = evidence.gate_gradients() + self.settings.regular_scale * factors.sign()
            adam_step(self.tensors, name, gradient, self.settings.learning_rate)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the factors."""
        return self.tensors[name], self.tensors[name]

    def knows(self, name: str) -> bool:
        """Return whether gradients told units apart."""
        return told_apart(self.tensors, name)

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return their magnitudes."""
        return self.tensors[name].abs()
