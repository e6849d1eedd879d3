"""The units of one dimension group while training: switched by a gate, and what is read of them in each step."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import TargetError
from hf_compress.graph.groups import ConsumerSlice, DimensionGroup
from hf_compress.instruments.gate import Gate, add_to_gradients, find_site, unit_gradients, unit_weights
from hf_compress.instruments.record import ChangeWatch, InputWatch, watchable
from hf_compress.instruments.sharded import whole
from hf_compress.pruning.method import Evidence, Method, Reading


class Units(Protocol):
    """What is pruned as one layer: a dimension group or a weight."""

    name: str
    num_units: int
    evidence: "StepEvidence"
    """What methods read."""

    def blank(self) -> Mapping[Reading, Tensor]:
        """Return zeros of the shapes that ``take`` returns, on the training device."""
        ...

    def take(self) -> Mapping[Reading, Tensor | None]:
        """Return what this rank gathered in a step, sums and counts that are to be averaged over ranks."""
        ...

    def set_mask(self, mask: Tensor) -> None:
        """Keep the units where ``mask`` [num_units] is True."""
        ...

    def set_values(self, training: Tensor, evaluation: Tensor) -> None:
        """Multiply units by factors [num_units]."""
        ...

    def fold(self, mask: Tensor, factors: Tensor | None) -> bool:
        """Write mask and factors into the weights; return whether these alone say now what is gone."""
        ...

    def stop_reading(self) -> None:
        """Leave only what switches units off in place."""
        ...

    def remove(self) -> None:
        """Take everything off."""
        ...


class StepEvidence(Evidence, Protocol):
    """Evidence that is renewed in each step."""

    kept: float
    """The fraction of the units that are kept now."""

    def give(self, readings: Mapping[Reading, Tensor]) -> None:
        """Make the averages over ranks the evidence of this step."""
        ...

    def add_to_gradients(self, change: Tensor) -> None:
        """Add to the gradients of the units' weights, [num_units, weights per unit]."""
        ...


class Readings:
    """The part of the evidence that is collected in one step."""

    kept = 1.0
    _given: Mapping[Reading, Tensor] = MappingProxyType({})

    def give(self, readings: Mapping[Reading, Tensor]) -> None:
        """Make the averages the evidence of this step."""
        self._given = dict(readings)

    def gate_gradients(self) -> Tensor:
        """Return d loss / d gate of this step, [num_units]."""
        return self._given["gate_gradients"]

    def activations(self) -> Tensor:
        """Return the mean of the method's statistic at each channel, [channels]."""
        sums = self._given["activations"]
        return sums[:-1] / sums[-1].clamp_min(1e-30)

    def changes(self) -> Tensor:
        """Return how much each layer changes what passes through, [num_units]."""
        sums, counts = self._given["changes"].unbind(dim=1)
        return sums / counts.clamp_min(1e-30)

    def density(self) -> float:
        """Return the fraction of the units that are kept now."""
        return self.kept


class GroupEvidence(Readings):
    """What there is to know about the units of one dimension group."""

    def __init__(self, group: DimensionGroup, model: PreTrainedModel) -> None:
        self.num_units = group.num_units
        layers = [model.get_submodule(name) for name in group.modules]
        sizes = [float(sum(parameter.numel() for parameter in layer.parameters())) for layer in layers]
        self.unit_sizes = torch.tensor(sizes) if sizes else None
        self._group = group
        self._model = model

    def weights(self) -> Tensor:
        """Return all weights of each unit, [num_units, weights per unit]."""
        return unit_weights(self._model, self._group)

    def weight_gradients(self) -> Tensor:
        """Return the gradients of all weights of each unit."""
        return unit_gradients(self._model, self._group)

    def by_unit(self, channels: Tensor) -> Tensor:
        """Return per-channel numbers of all consumers by unit, [num_units, channels per unit]."""
        parts = channels.split(self.channels())  # type: ignore[no-untyped-call]
        found = [each[part.index.to(each.device)] for each, part in zip(parts, self._group.gates, strict=True)]
        return torch.cat(found, dim=1)

    def channels(self) -> list[int]:
        """Return the number of channels that each consumer reads."""
        return [self._model.get_parameter(part.parameter).shape[part.dim] for part in self._group.gates]

    def columns(self) -> Tensor:
        """Return the sum of the magnitudes of the weights that read each channel, [num_units, channels per unit]."""
        return self.by_unit(torch.cat([self._column_sums(part) for part in self._group.gates]))

    def add_to_gradients(self, change: Tensor) -> None:
        """Add to the gradients of the units' weights, [num_units, weights per unit]."""
        add_to_gradients(self._model, self._group, change)

    def _column_sums(self, part: ConsumerSlice) -> Tensor:
        weight = whole(self._model.get_parameter(part.parameter).detach()).float()
        return weight.abs().movedim(part.dim, 0).flatten(1).sum(dim=1)


class GroupUnits:
    """The units of one dimension group.

    Args:
        group: The group.
        model: The model that has it.
        method: What the units will be scored by: it says what has to be read.

    Raises:
        TargetError: If the model's modules do not let the method read what it needs.
    """

    def __init__(self, group: DimensionGroup, model: PreTrainedModel, method: Method) -> None:
        self.name = group.name
        self.num_units = group.num_units
        self.evidence = GroupEvidence(group, model)
        reads: Collection[str] = method.reads
        sites = [find_site(model, group, part) for part in group.gates] if "activations" in reads else []
        watched = [(site.name, watchable(site.name, site.module, site.owner)) for site in sites]
        if "activations" in reads and not watched:
            raise TargetError(f"group {group.name!r}: no module reads its units, so there are no activations to watch.")
        self.gate = Gate(group, model, needs_gradient="gate_gradients" in reads)
        self._watches = [InputWatch(name, module, method.statistic) for name, module in watched]
        self._changes: ChangeWatch | None = None
        if "changes" in reads and self.gate.layers is not None:
            self._changes = ChangeWatch(self.gate.layers, group.num_units, self.gate.value)

    def blank(self) -> Mapping[Reading, Tensor]:
        """Return zeros of the shapes that ``take`` returns."""
        zeros = self.gate.value.new_zeros
        found: dict[Reading, Tensor] = {}
        if self.gate.value.requires_grad:
            found["gate_gradients"] = zeros(self.num_units)
        if self._watches:
            found["activations"] = zeros(sum(self.evidence.channels()) + 1)
        if self._changes is not None:
            found["changes"] = zeros(self.num_units, 2)
        return found

    def take(self) -> Mapping[Reading, Tensor | None]:
        """Return what this rank gathered in a step."""
        found: dict[Reading, Tensor | None] = {}
        if self.gate.value.requires_grad:
            found["gate_gradients"] = self.gate.take_gradient()
        if self._watches:
            found["activations"] = _joined([watch.take() for watch in self._watches])
        if self._changes is not None:
            found["changes"] = self._changes.take()
        return found

    def set_mask(self, mask: Tensor) -> None:
        """Keep the units where ``mask`` [num_units] is True."""
        self.evidence.kept = float(mask.float().mean())
        self.gate.set_mask(mask.to(self.gate.value.device))

    def set_values(self, training: Tensor, evaluation: Tensor) -> None:
        """Multiply units by factors [num_units]."""
        self.gate.set_values(training, evaluation)

    def fold(self, mask: Tensor, factors: Tensor | None) -> bool:
        """Write mask and factors into the weights; return whether these alone say now what is gone."""
        if factors is not None:
            self.gate.fold_factors(factors)
            self.set_mask(mask)
        self.gate.fold(mask)
        return self.gate.folds or bool(mask.all())

    def stop_reading(self) -> None:
        """Leave the gate alone in place."""
        for watch in self._watches:
            watch.remove()
        self._watches = []
        self._changes = None
        self.gate.value.requires_grad_(False)

    def remove(self) -> None:
        """Take everything off."""
        self.stop_reading()
        self.gate.remove()


def _joined(sums: list[Tensor | None]) -> Tensor | None:
    """Return the sums of all consumers and one number of tokens: that of each is divided out."""
    if any(each is None for each in sums):
        return None
    found = [each for each in sums if each is not None]
    count = found[0][-1:]
    return torch.cat([*(each[:-1] * (count / each[-1:].clamp_min(1e-30)) for each in found), count])
