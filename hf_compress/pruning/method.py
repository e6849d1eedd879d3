"""How a pruning method works: what it reads in each optimizer step, and how it scores.

Names are registered in ``registry.criteria``. A score is higher for what is worth more. Everything here is tensors in,
tensors out; ``hf_compress.instruments`` reads models and switches units off.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hf_compress.config import TRAINABLE_STRUCTURES
from hf_compress.config.base import Settings
from hf_compress.registry import criteria

Reading = Literal["gate_gradients", "weight_gradients", "activations", "changes"]
"""What is collected in every optimizer step for the methods that ask for it."""

EVERYWHERE = frozenset(TRAINABLE_STRUCTURES)
LAYERS = frozenset({"layers"})
GATED = EVERYWHERE - {"experts"}
"""The structures whose gates get gradients: experts are chosen by a router, whose choice has none."""


class Evidence(Protocol):
    """What there is to know about the units of one layer, averaged over the ranks."""

    num_units: int
    """Of the layer."""

    unit_sizes: Tensor | None
    """The number of weights of each unit, [num_units]; None where all have alike."""

    def weights(self) -> Tensor:
        """Return all weights of each unit, [num_units, weights per unit]; smaller units end in zeros."""
        ...

    def gate_gradients(self) -> Tensor:
        """Return d loss / d gate of this step at a gate in front of the unit's consumers, [num_units]."""
        ...

    def weight_gradients(self) -> Tensor:
        """Return d loss / d weight of this step, [num_units, weights per unit]."""
        ...

    def activations(self) -> Tensor:
        """Return the mean of ``Method.statistic`` over this step's tokens at each channel, [channels]."""
        ...

    def by_unit(self, channels: Tensor) -> Tensor:
        """Return per-channel numbers sorted by unit, [num_units, channels per unit]."""
        ...

    def columns(self) -> Tensor:
        """Return the sum of the magnitudes of the weights that read each channel, [num_units, channels per unit]."""
        ...

    def changes(self) -> Tensor:
        """Return 1 - the mean cosine between what a layer is given and what it returns in this step, [num_units]."""
        ...

    def density(self) -> float:
        """Return the fraction of the layer's units that are kept now."""
        ...


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Settings):
    """Settings of one method: the keys of ``PruningConfig.options``."""

    lever: ClassVar[str] = "its options"
    """What to raise where a method that decides removed nothing."""

    @property
    def decides(self) -> bool:
        """Whether the method itself finds out how much goes, so that no sparsity is asked for."""
        return False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is told about the run."""

    score_decay: float = 0.95
    """Of the moving average, see ``PruningConfig.score_decay``."""

    seed: int = 0
    """Of whatever is random."""

    sparsity: float | None = None
    """The final sparsity."""


class Method:
    """One criterion at work on the layers of one pool.

    State is kept in ``tensors``, by layer name or ``<layer name>/<what>``: checkpoints hold it, and it is the same on
    all ranks.
    """

    options: ClassVar[type[MethodOptions]] = MethodOptions
    reads: ClassVar[frozenset[Reading]] = frozenset()
    averages: ClassVar[bool] = False
    """Whether ``score_decay`` has an effect."""

    structures: ClassVar[frozenset[str]] = EVERYWHERE
    trains: ClassVar[bool] = True
    """Whether it works while the model trains; if not, ``prune_oneshot`` carries it out."""

    defers: ClassVar[bool] = False
    """Whether masks change at the end of the schedule only, see ``DeferringMethod``."""

    needs_sparsity: ClassVar[bool] = False
    """Whether it must know the final sparsity of its structure, which no budget of the whole model says."""

    run_length: ClassVar[Literal["row"] | None] = None
    """``"row"``: single weights compete within their output row only."""

    def __init__(self, settings: Any, setting: Setting) -> None:
        self.settings = settings
        self.setting = setting
        self.tensors: dict[str, Tensor] = {}
        self.share = 0.0
        """Of the schedule at the step under way, in [0, 1]."""

        self.over = False
        """Whether the schedule has ended."""

    @staticmethod
    def statistic(x: Tensor) -> Tensor:
        """Return what is averaged of the inputs of the units' consumers, elementwise.

        Only methods that read ``activations`` have one.
        """
        raise NotImplementedError

    def start(self, name: str, evidence: Evidence) -> None:
        """Make the state of one layer; weights can be read."""

    def step(self, name: str, evidence: Evidence) -> None:
        """Take in one optimizer step, before the optimizer acts; whatever ``reads`` names can be read."""

    def end_step(self) -> None:
        """Go on after ``step`` was called for all layers."""

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return finite scores [num_units], higher = keep; weights can be read."""
        raise NotImplementedError

    def knows(self, name: str) -> bool:
        """Return whether training said anything about the units of a layer; methods that learn look at what moved."""
        return True

    def threshold(self, share: float) -> float | None:
        """Return the lowest score that may stay, if the method itself finds out how much goes; else None.

        Args:
            share: Of the schedule, in [0, 1].
        """
        return None


class DeferringMethod(Method):
    """Changes no mask before the end of the schedule, where all goes at once; until then it learns what.

    The schedule's share is a target that the method may use on the way.
    """

    defers = True

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return what units are multiplied by in training and in evaluation, [num_units] each; None: their mask."""
        return None

    def project(self, name: str, evidence: Evidence, mask: Tensor) -> None:
        """Take in what would be kept if the masks changed now to the final sparsity; for methods that defer."""

    def pull(self, name: str, evidence: Evidence) -> Tensor | None:
        """Return what to add to the gradients of this step, [num_units, weights per unit], or None."""
        return None


SHORT = 2**16
"""Numbers of a tensor that is worth a copy rather than some kernels of its own."""


class CurrentMethod(Method):
    """Reads the weights as they are when the masks change."""

    of: ClassVar[Callable[[Tensor], Tensor]]
    """All weights of each unit [num_units, weights per unit] -> scores [num_units]."""

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return scores of the weights as they are."""
        return type(self).of(evidence.weights())


class AveragedMethod(Method):
    """Averages what is measured in each step: s <- decay * s + (1 - decay) * s_step, from 0.

    A step in which a layer has numbers that are not finite is left out of its average, as the optimizer leaves it out.
    Nothing waits for the device, and short tensors are averaged together: on a GPU, time goes by their number, not by
    their length.
    """

    averages = True

    def __init__(self, settings: Any, setting: Setting) -> None:
        super().__init__(settings, setting)
        self._short: dict[str, Tensor] = {}
        """By layer, what was measured in the step under way."""

    def measure(self, evidence: Evidence) -> Tensor:
        """Return what is measured in one step; of any shape."""
        raise NotImplementedError

    def step(self, name: str, evidence: Evidence) -> None:
        """Measure."""
        if name in self._short:  # of the step before
            self.end_step()
        measured = self.measure(evidence)
        if measured.numel() > SHORT:
            self._average({name: measured})
        else:
            self._short[name] = measured

    def end_step(self) -> None:
        """Average what is left."""
        alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, measured in self._short.items():
            alike.setdefault((measured.device, measured.dtype), {})[name] = measured
        for each in alike.values():
            self._average(each)
        self._short.clear()

    def _average(self, measured: Mapping[str, Tensor]) -> None:
        """Take in one step of layers whose tensors are on the same device."""
        decay = self.setting.score_decay
        before = [self.tensors[name] if name in self.tensors else torch.zeros_like(measured[name]) for name in measured]
        average, new = (torch.cat([each.flatten() for each in several]) for several in (before, measured.values()))
        sizes = [each.numel() for each in measured.values()]
        finite = [part.all().expand(len(part)) for part in torch.split_with_sizes(torch.isfinite(new), sizes)]
        moved = (average * decay).add_(new, alpha=1 - decay).where(torch.cat(finite), average)
        parts = torch.split_with_sizes(moved, sizes)
        for (name, each), part in zip(measured.items(), parts, strict=True):
            self.tensors[name] = part.view(each.shape)

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the average."""
        average = self.average(name)
        return torch.zeros(evidence.num_units) if average is None else average

    def average(self, name: str) -> Tensor | None:
        """Return the average of what was measured of a layer, of its shape; None if nothing was."""
        self.end_step()
        return self.tensors.get(name)


def criterion_of_weights(
    *names: str, structures: frozenset[str] = EVERYWHERE
) -> Callable[[Callable[..., Tensor]], Any]:
    """Register a function of the weights of units as a method.

    Args:
        names: Its names.
        structures: What it works on.
    """

    def add(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        members = {"of": staticmethod(function), "__doc__": function.__doc__, "structures": structures}
        criteria.register(*names)(type(function.__name__, (CurrentMethod,), members))
        return function

    return add


def averaged_criterion(*names: str, reads: Reading, structures: frozenset[str] = EVERYWHERE) -> Callable[[Any], Any]:
    """Register a function of the evidence of one step as a method whose scores are its moving average.

    Args:
        names: Its names.
        reads: What it reads.
        structures: What it works on.
    """

    def add(function: Callable[[Evidence], Tensor]) -> Callable[[Evidence], Tensor]:
        def measure(self: AveragedMethod, evidence: Evidence) -> Tensor:
            return function(evidence)

        members = {
            "measure": measure,
            "__doc__": function.__doc__,
            "reads": frozenset({reads}),
            "structures": structures,
        }
        criteria.register(*names)(type(function.__name__, (AveragedMethod,), members))
        return function

    return add


def is_useful(scores: Tensor) -> bool:
    """Return whether scores say anything: they are not all zero."""
    return bool(((scores != 0) & (scores.abs() != math.inf)).any())
