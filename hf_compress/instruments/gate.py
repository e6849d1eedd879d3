"""Structured pruning while training: one gate per unit, at the input of whatever consumes the unit.

A gate of 0 there removes the unit exactly, biases and non-linearities included, and the gradient with respect to
the gate is the unit's first-order importance. The gate of a whole layer mixes what it returns with what it was given.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import TargetError, TrainingError
from hf_compress.graph.groups import ConsumerSlice, DimensionGroup, ParameterSlice, unit_of_position
from hf_compress.instruments.adapters import adapter_slices, base_layer, check_lora, effective_weight, is_lora
from hf_compress.instruments.attach import (
    attach,
    attachment_of,
    detach_if_empty,
    find_leaf_kind,
    own_class,
    refuse_patched,
)
from hf_compress.instruments.layer import LayerGates
from hf_compress.instruments.removed import RemovedUnits, tell_removed, untell_removed
from hf_compress.instruments.sharded import add_in_place, reshard, scale, whole, zero
from hf_compress.instruments.subset import SubsetGate


class Gate:
    """The gates of one dimension group, attached to whatever reads its units.

    The tensor belongs to the callback, never to the model: checkpoints and the Trainer's optimizer do not see it.
    Norms and routers take no part in the gradient: what a unit does reaches the loss through its consumers.
    """

    def __init__(self, group: DimensionGroup, model: nn.Module, *, needs_gradient: bool) -> None:
        self.group = group
        self.model = model
        sites = [find_site(model, group, part) for part in group.gates]  # all are checked before the first is touched
        device = next(model.parameters()).device
        self.value = torch.ones(group.num_units, device=device, requires_grad=needs_gradient)
        self.separate: Tensor | None = None
        """Gradient of another loss than the one that is trained with, [num_units]; ``take_gradient`` returns it."""
        self._evaluation: Tensor | None = None
        self.owners: dict[int, Tensor] = {}
        """By size of what a consumer reads, the unit of each position, [size]; ``num_units`` where none of these is."""
        self._installed: list[tuple[nn.Module, list[Any], Any]] = []
        for site in sites:
            size = model.get_parameter(site.part.parameter).shape[site.part.dim]
            self.owners.setdefault(size, unit_of_position(site.part, size))
            self._install(site)
        for part in group.sources:
            owner = model.get_submodule(part.parameter.rpartition(".")[0])
            self._install(Site(part.module, model.get_submodule(part.module), part, owner))
        self._told: list[tuple[nn.Module, RemovedUnits]] = []
        self._tell()
        self._subsets = SubsetGate(group, model)
        self.layers = LayerGates(group, model, self.value) if group.modules else None

    def _install(self, site: "Site") -> None:
        size = self.model.get_parameter(site.part.parameter).shape[site.part.dim]
        factors = _ExpandedGate(self, unit_of_position(site.part, size).to(self.value.device))
        attachment = attach(site.name, site.module)
        if site.owner is None:
            attachment.input_gates.append(factors)
            self._installed.append((site.module, attachment.input_gates, factors))
        else:
            for owner, name, dim in _places(site.owner, site.part):
                gate = _ParameterFactors(owner, name, dim, factors)
                attachment.parameter_gates.append(gate)
                self._installed.append((site.module, attachment.parameter_gates, gate))

    def _tell(self) -> None:
        """Let whatever holds a slice know, so that removed units do not count in its quantizer's range."""
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append((module, name))
        for each in self.group.slices:
            parameter = self.model.get_parameter(each.parameter)
            owners = unit_of_position(each, parameter.shape[each.dim]).to(self.value.device)
            for module, name in holders[id(parameter)]:
                units = RemovedUnits(name, each.dim, _ExpandedGate(self, owners))
                tell_removed(module, units)
                self._told.append((module, units))

    def set_mask(self, mask: Tensor) -> None:
        """Open the gates where ``mask`` [num_units] is True and close the others, in place."""
        with torch.no_grad():
            self.value.copy_(mask)
        self._evaluation = None
        self._subsets.set_mask(mask)

    def set_values(self, training: Tensor, evaluation: Tensor) -> None:
        """Set factors [num_units] instead of 0 and 1, those of training in place; norms see all units.

        Args:
            training: While ``model.training`` is set.
            evaluation: Otherwise.
        """
        with torch.no_grad():
            self.value.copy_(training)
        self._evaluation = evaluation.detach().to(self.value.device)

    def current(self) -> Tensor:
        """Return what units are multiplied by now, [num_units]."""
        return self.value if self._evaluation is None or self.model.training else self._evaluation

    @property
    def folds(self) -> bool:
        """Whether weights alone can say that units are gone: not for norms over all units, nor for whole layers."""
        return not self.group.subsets and not self.group.modules

    def take_gradient(self) -> Tensor | None:
        """Return the gradient gathered since the last call, [num_units], and forget it."""
        gradient = self.value.grad if self.separate is None else self.separate.clone()
        self.value.grad = None
        if self.separate is not None:
            self.separate.zero_()
        return gradient

    def remove(self) -> None:
        """Detach from all consumers."""
        for module, attached, mine in self._installed:
            if mine in attached:
                attached.remove(mine)
            detach_if_empty(module)
        self._installed.clear()
        for module, units in self._told:
            untell_removed(module, units)
        self._told.clear()
        self._subsets.remove()
        if self.layers is not None:
            self.layers.remove()

    def fold(self, mask: Tensor) -> None:
        """Zero all weights of masked units: the model keeps its shapes and computes as if gated.

        Zero consumers alone would do that too, but then fake quantizers of the consumers' inputs would still see
        the removed channels and choose other scales than in the shrunk model. Collective under FSDP.
        """
        pruned = (~mask).nonzero().flatten()
        if len(pruned) == 0:
            return
        reshard(self.model)
        for part in self.group.slices:
            for weight, dim in _tensors(self.model, part):
                zero(weight, dim, part.index[pruned].flatten())

    def fold_factors(self, factors: Tensor) -> None:
        """Multiply the weights at each gate by ``factors`` [num_units]. Collective under FSDP."""
        reshard(self.model)
        for part in (*self.group.gates, *self.group.sources):
            for weight, dim in _tensors(self.model, part):
                owner = unit_of_position(part, weight.shape[dim])
                scale(weight, dim, torch.cat([factors.detach().cpu(), torch.ones(1)])[owner])


@contextmanager
def gated(model: nn.Module, groups: Mapping[str, DimensionGroup], *, needs_gradient: bool) -> Iterator[dict[str, Gate]]:
    """Have gates on groups.

    Args:
        model: The model.
        groups: By name.
        needs_gradient: See ``Gate``.

    Yields:
        The gates by name of the group.
    """
    gates: dict[str, Gate] = {}
    try:
        for name, group in groups.items():
            gates[name] = Gate(group, model, needs_gradient=needs_gradient)
        yield gates
    finally:
        for gate in gates.values():
            gate.remove()


class _ExpandedGate:
    """One factor per input channel of one consumer."""

    def __init__(self, gate: Gate, owner: Tensor) -> None:
        num_units = gate.group.num_units
        self.gate = gate
        self.owner = owner
        self.covers_all = bool((owner < num_units).all())
        run, rest = divmod(len(owner), num_units)
        in_order = torch.arange(num_units, device=owner.device).repeat_interleave(run)
        self.run = run if rest == 0 and torch.equal(owner, in_order) else None
        """Channels of a unit, if they are neighbours and units come in their order."""

    def __call__(self) -> Tensor:
        value = self.gate.current()
        if self.run is not None:  # nearly always; looking units up takes a sort in the backward pass on a GPU
            return value if self.run == 1 else value.unsqueeze(1).expand(-1, self.run).reshape(-1)
        if not self.covers_all:  # channels of other groups pass unchanged
            value = torch.cat([value, value.new_ones(1)])
        return value[self.owner]


class _ParameterFactors:
    """Multiplies a parameter along one dimension."""

    def __init__(self, owner: nn.Module, name: str, dim: int, factors: _ExpandedGate) -> None:
        self.owner = owner
        self.name = name
        self.dim = dim
        self.factors = factors

    def __call__(self, parameter: Tensor) -> Tensor:
        shape = [1] * parameter.dim()
        shape[self.dim] = -1
        return parameter * self.factors().to(parameter.dtype).view(shape)


def open_units(gate: Gate) -> Tensor:
    """Return which units are not gone, bool, [num_units]; what training draws at random is not for good."""
    settled = gate.value if gate._evaluation is None else gate._evaluation
    return settled.detach() != 0


def gates_on(model: nn.Module) -> list[Gate]:
    """Return the gates that act on a model at its consumers or producers, each once."""
    found: dict[int, Gate] = {}
    for attachment in filter(None, map(attachment_of, model.modules())):
        for each in (*attachment.input_gates, *attachment.parameter_gates):
            factors = getattr(each, "factors", each)
            if isinstance(factors, _ExpandedGate):
                found[id(factors.gate)] = factors.gate
    return list(found.values())


def unit_weights(model: nn.Module, group: DimensionGroup) -> Tensor:
    """Return all weights of each unit, adapters merged, [num_units, weights per unit]. Collective under FSDP.

    Layers of unequal sizes are filled up with zeros.
    """
    if group.modules:
        return _layer_tensors(model, group, lambda parameter: parameter)
    parts = []
    for part in group.slices:
        owner, _, name = part.parameter.rpartition(".")
        module = model.get_submodule(owner)
        merged = name == "weight" and is_lora(module)
        tensor = effective_weight(module) if merged else model.get_parameter(part.parameter)
        parts.append(_by_unit(whole(tensor.detach()), part))
    return torch.cat(parts, dim=1)


def unit_gradients(model: nn.Module, group: DimensionGroup) -> Tensor:
    """Return the gradient of each weight that ``unit_weights`` returns; 0 where there is none. Collective under FSDP.

    Raises:
        TrainingError: If no weight of the group has a gradient.
    """
    found = False

    def gradient(parameter: Tensor) -> Tensor:
        nonlocal found
        found = found or parameter.grad is not None
        return torch.zeros_like(whole(parameter)) if parameter.grad is None else whole(parameter.grad)

    if group.modules:
        result = _layer_tensors(model, group, gradient)
    else:
        parts = [_by_unit(gradient(model.get_parameter(part.parameter)), part) for part in group.slices]
        result = torch.cat(parts, dim=1)
    if not found:
        raise _frozen(group)
    return result


def _frozen(group: DimensionGroup) -> TrainingError:
    return TrainingError(
        f"the weights of {group.name!r} get no gradients: they are frozen, as under LoRA. Choose a criterion that "
        "reads gate gradients, such as 'taylor', or train the weights."
    )


def add_to_gradients(model: nn.Module, group: DimensionGroup, change: Tensor) -> None:
    """Add ``change``, shaped as ``unit_weights`` returns them, to the gradients. Collective under FSDP.

    Raises:
        TrainingError: If all weights of the group are frozen.
    """
    if not any(model.get_parameter(part.parameter).requires_grad for part in group.slices):
        raise _frozen(group)
    columns = 0
    for part in group.slices:
        parameter = model.get_parameter(part.parameter)
        shape = list(whole(parameter.detach()).movedim(part.dim, 0).shape)
        per_unit = part.index.shape[1] * math.prod(shape[1:])
        mine = change[:, columns : columns + per_unit].reshape(-1, *shape[1:]).to(parameter.device)
        columns += per_unit
        if parameter.grad is not None:
            moved = mine.new_zeros(shape).index_add_(0, part.index.flatten().to(mine.device), mine)
            add_in_place(parameter.grad, moved.movedim(0, part.dim))


def _by_unit(tensor: Tensor, part: ParameterSlice) -> Tensor:
    moved = tensor.movedim(part.dim, 0)
    return moved[part.index.to(moved.device)].reshape(part.index.shape[0], -1).float()


def _layer_tensors(model: nn.Module, group: DimensionGroup, read: Callable[[Tensor], Tensor]) -> Tensor:
    rows = []
    for name in group.modules:
        module = model.get_submodule(name)
        found = [whole(read(parameter).detach()).flatten().float() for parameter in module.parameters()]
        rows.append(torch.cat(found))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _places(owner: nn.Module, part: ParameterSlice) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield what holds a slice of a parameter: module, parameter and dimension of the units. LoRA has one more."""
    yield base_layer(owner), part.parameter.rpartition(".")[2], part.dim
    kind = find_leaf_kind(owner)
    if kind is not None:
        for factor, dim in adapter_slices(owner, part, kind.weight_in_dim):
            yield factor, "weight", dim


def _tensors(model: nn.Module, part: ParameterSlice) -> Iterator[tuple[Tensor, int]]:
    """Yield what holds a slice of a weight, each tensor with the dimension of the units."""
    owner = model.get_submodule(part.parameter.rpartition(".")[0])
    for module, name, dim in _places(owner, part):
        yield module.get_parameter(name), dim


def check_gateable(model: nn.Module, groups: Sequence[DimensionGroup]) -> None:
    """Check that every group can be gated.

    Raises:
        TargetError: If a consumer is not a module that gates can be attached to, or a layer has an adapter that is
            not understood.
    """
    for group in groups:
        for owner in {each.parameter.rpartition(".")[0] for each in group.slices}:
            check_lora(owner, model.get_submodule(owner))
        for part in group.gates:
            find_site(model, group, part)


@dataclass(frozen=True)
class Site:
    """One place where a gate acts."""

    name: str
    module: nn.Module
    part: ParameterSlice
    owner: nn.Module | None
    """The module whose parameter it multiplies while ``module`` runs; None if it multiplies the input of a leaf."""


def find_site(model: nn.Module, group: DimensionGroup, part: ConsumerSlice) -> Site:
    """Return where the gate of a consumer acts.

    Raises:
        TargetError: If its module is not one that gates can be attached to.
    """
    module = model.get_submodule(part.module)
    refuse_patched(part.module, module)
    owner = part.parameter.rpartition(".")[0]
    kind = find_leaf_kind(module)
    if kind is not None and kind.weight_in_dim == part.dim and module.weight is model.get_parameter(part.parameter):
        above = part.module.rpartition(".")[0]
        reader = model.get_submodule(above)
        # PyTorch's attention takes the weight of its output projection and never calls that module.
        if own_class(reader).forward is nn.MultiheadAttention.forward:
            refuse_patched(above, reader)
            return Site(above, reader, part, module)
        return Site(part.module, module, part, None)
    if owner == part.module or owner.startswith(f"{part.module}."):
        return Site(part.module, module, part, model.get_submodule(owner))
    raise TargetError(
        f"group {group.name!r}: its consumer {part.parameter!r} (dimension {part.dim}) is read by "
        f"{part.module!r}, a {type(module).__name__}, where no gate can be attached. Exclude the group."
    )
