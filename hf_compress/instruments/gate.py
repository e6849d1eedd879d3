"""Structured pruning while training: one gate per unit, at the input of whatever consumes the unit.

A gate of 0 there removes the unit exactly, biases and non-linearities included, and the gradient with respect to
the gate is the unit's first-order importance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_compress.errors import TargetError
from hf_compress.graph.groups import DimensionGroup, ParameterSlice, unit_of_position
from hf_compress.instruments.attach import attach, attachment_of, detach_if_empty, leaf_kind


class Gate:
    """The gates of one dimension group, attached to its consumers.

    The tensor belongs to the callback, never to the model: checkpoints and the Trainer's optimizer do not see it.
    """

    def __init__(self, group: DimensionGroup, model: nn.Module, *, needs_gradient: bool) -> None:
        self.group = group
        self.model = model
        sites = [_site(model, group, part) for part in group.gates]  # all are checked before the first is touched
        device = next(model.parameters()).device
        self.value = torch.ones(group.num_units, device=device, requires_grad=needs_gradient)
        self._inputs: list[tuple[nn.Module, _ExpandedGate]] = []
        for name, module, part in sites:
            size = model.get_parameter(part.parameter).shape[part.dim]
            expanded = _ExpandedGate(self, unit_of_position(part, size).to(device))
            attach(name, module).input_gates.append(expanded)
            self._inputs.append((module, expanded))

    def set_mask(self, mask: Tensor) -> None:
        """Open the gates where ``mask`` [num_units] is True and close the others, in place."""
        with torch.no_grad():
            self.value.copy_(mask)

    def take_gradient(self) -> Tensor | None:
        """Return the gradient gathered since the last call, [num_units], and forget it."""
        gradient, self.value.grad = self.value.grad, None
        return gradient

    def remove(self) -> None:
        """Detach from all consumers."""
        for module, expanded in self._inputs:
            attachment = attachment_of(module)
            if attachment is not None and expanded in attachment.input_gates:
                attachment.input_gates.remove(expanded)
                detach_if_empty(module)
        self._inputs.clear()

    def fold(self, mask: Tensor) -> None:
        """Zero all weights of masked units: the model keeps its shapes and computes as if gated.

        Zero consumers alone would do that too, but then fake quantizers of the consumers' inputs would still see
        the removed channels and choose other scales than in the shrunk model.
        """
        pruned = (~mask).nonzero().flatten()
        if len(pruned) == 0:
            return
        with torch.no_grad():
            for part in self.group.slices:
                weight = self.model.get_parameter(part.parameter)
                weight.index_fill_(part.dim, part.index[pruned].flatten().to(weight.device), 0.0)


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


def unit_weights(model: nn.Module, group: DimensionGroup) -> Tensor:
    """Return all weights of each unit of a group, [num_units, weights per unit]."""
    parts = []
    for part in group.slices:
        weight = model.get_parameter(part.parameter).detach().movedim(part.dim, 0)
        parts.append(weight[part.index.to(weight.device)].reshape(group.num_units, -1).float())
    return torch.cat(parts, dim=1)


def check_gateable(model: nn.Module, groups: Sequence[DimensionGroup]) -> None:
    """Check that every group can be gated.

    Raises:
        TargetError: If a consumer is not a module that gates can be attached to.
    """
    for group in groups:
        for part in group.gates:
            _site(model, group, part)


def _site(model: nn.Module, group: DimensionGroup, part: ParameterSlice) -> tuple[str, nn.Module, ParameterSlice]:
    name, _, parameter = part.parameter.rpartition(".")
    module = model.get_submodule(name)
    if parameter != "weight" or leaf_kind(name, module).weight_in_dim != part.dim:
        raise TargetError(
            f"group {group.name!r}: its consumer {part.parameter!r} (dimension {part.dim}) is not the input side of a "
            f"{type(module).__name__} weight, so no gate can be attached. Exclude the group."
        )
    return name, module, part
