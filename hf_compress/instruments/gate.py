"""Structured pruning while training: one gate per unit, at the input of whatever consumes the unit.

A gate of 0 there removes the unit exactly, biases and non-linearities included, and the gradient with respect to
the gate is the unit's first-order importance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import TargetError
from hf_compress.graph.groups import ConsumerSlice, DimensionGroup, ParameterSlice, unit_of_position
from hf_compress.instruments.adapters import adapter_slices, check_lora, effective_weight, is_lora
from hf_compress.instruments.attach import attach, detach_if_empty, find_leaf_kind, own_class, refuse_patched
from hf_compress.instruments.sharded import reshard, whole, zero
from hf_compress.instruments.subset import SubsetGate


class Gate:
    """The gates of one dimension group, attached to whatever reads its units.

    The tensor belongs to the callback, never to the model: checkpoints and the Trainer's optimizer do not see it.
    Norms and routers take no part in the gradient: what a unit does reaches the loss through its consumers.
    """

    def __init__(self, group: DimensionGroup, model: nn.Module, *, needs_gradient: bool) -> None:
        self.group = group
        self.model = model
        sites = [_site(model, group, part) for part in group.gates]  # all are checked before the first is touched
        device = next(model.parameters()).device
        self.value = torch.ones(group.num_units, device=device, requires_grad=needs_gradient)
        self._installed: list[tuple[nn.Module, list[Any], Any]] = []
        for site in sites:
            self._install(site)
        for part in group.sources:
            owner = model.get_submodule(part.parameter.rpartition(".")[0])
            self._install(_Site(part.module, model.get_submodule(part.module), part, owner))
        self._subsets = SubsetGate(group, model)

    def _install(self, site: "_Site") -> None:
        size = self.model.get_parameter(site.part.parameter).shape[site.part.dim]
        factors = _ExpandedGate(self, unit_of_position(site.part, size).to(self.value.device))
        attachment = attach(site.name, site.module)
        if site.owner is None:
            attachment.input_gates.append(factors)
            self._installed.append((site.module, attachment.input_gates, factors))
        else:
            gate = _ParameterFactors(site.owner, site.part.parameter.rpartition(".")[2], site.part.dim, factors)
            attachment.parameter_gates.append(gate)
            self._installed.append((site.module, attachment.parameter_gates, gate))

    def set_mask(self, mask: Tensor) -> None:
        """Open the gates where ``mask`` [num_units] is True and close the others, in place."""
        with torch.no_grad():
            self.value.copy_(mask)
        self._subsets.set_mask(mask)

    def take_gradient(self) -> Tensor | None:
        """Return the gradient gathered since the last call, [num_units], and forget it."""
        gradient, self.value.grad = self.value.grad, None
        return gradient

    def remove(self) -> None:
        """Detach from all consumers."""
        for module, attached, mine in self._installed:
            if mine in attached:
                attached.remove(mine)
            detach_if_empty(module)
        self._installed.clear()
        self._subsets.remove()

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


class _ExpandedGate:
    """One factor per input channel of one consumer."""

    def __init__(self, gate: Gate, owner: Tensor) -> None:
        self.gate = gate
        self.owner = owner
        self.covers_all = bool((owner < gate.group.num_units).all())

    def __call__(self) -> Tensor:
        value = self.gate.value
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


def unit_weights(model: nn.Module, group: DimensionGroup) -> Tensor:
    """Return all weights of each unit, adapters merged, [num_units, weights per unit]. Collective under FSDP."""
    parts = []
    for part in group.slices:
        owner, _, name = part.parameter.rpartition(".")
        module = model.get_submodule(owner)
        merged = name == "weight" and is_lora(module)
        tensor = effective_weight(module) if merged else model.get_parameter(part.parameter)
        weight = whole(tensor.detach()).movedim(part.dim, 0)
        parts.append(weight[part.index.to(weight.device)].reshape(group.num_units, -1).float())
    return torch.cat(parts, dim=1)


def _tensors(model: nn.Module, part: ParameterSlice) -> Iterator[tuple[Tensor, int]]:
    """Yield what holds a slice of a weight, each tensor with the dimension of the units: LoRA has two more."""
    yield model.get_parameter(part.parameter), part.dim
    owner = model.get_submodule(part.parameter.rpartition(".")[0])
    kind = find_leaf_kind(owner)
    if kind is not None:
        yield from adapter_slices(owner, part, kind.weight_in_dim)


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
            _site(model, group, part)


@dataclass(frozen=True)
class _Site:
    """One place where a gate acts."""

    name: str
    module: nn.Module
    part: ParameterSlice
    owner: nn.Module | None
    """The module whose parameter it multiplies while ``module`` runs; None if it multiplies the input of a leaf."""


def _site(model: nn.Module, group: DimensionGroup, part: ConsumerSlice) -> _Site:
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
            return _Site(above, reader, part, module)
        return _Site(part.module, module, part, None)
    if owner == part.module or owner.startswith(f"{part.module}."):
        return _Site(part.module, module, part, model.get_submodule(owner))
    raise TargetError(
        f"group {group.name!r}: its consumer {part.parameter!r} (dimension {part.dim}) is read by "
        f"{part.module!r}, a {type(module).__name__}, where no gate can be attached. Exclude the group."
    )
