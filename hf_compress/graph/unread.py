"""Parameters that no recorded forward pass reads, but that share the hidden size.

A mask token is read in training alone, an expert only when a token is sent to it. A residual stream must not become
smaller without them. Which of their dimensions go along is found where it is decided: the architecture is built with
another hidden size, on the meta device, and what changes with the group belongs to it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.graph.depth import build_empty, edited, integer_fields
from hf_compress.graph.groups import ConsumerSlice, DimensionGroup, ParameterSlice

UNREAD = "parameter {!r} is read by none of the recorded forward passes and may have this dimension too"


def with_unread(model: nn.Module, read: Iterable[str], groups: list[DimensionGroup]) -> list[DimensionGroup]:
    """Add the slices of unread parameters to the groups of residual streams; freeze where they cannot be told.

    Args:
        model: The analyzed model.
        read: Names of the parameters that were recorded.
        groups: Its groups.
    """
    known = set(read)
    unread = {name: parameter.shape for name, parameter in model.named_parameters() if name not in known}
    if not unread:
        return groups
    done = [_completed(model, unread, group) if group.kind == "hidden" else group for group in groups]
    # Two residual streams of one size grow together: then it cannot be told whose the parameter is.
    owners: dict[tuple[str, int], int] = {}
    for group in done:
        for part in group.slices:
            if part.parameter in unread:
                owners[part.parameter, part.dim] = owners.get((part.parameter, part.dim), 0) + 1
    shared = {where for where, count in owners.items() if count > 1}
    return [_ambiguous(group, shared) for group in done]


def _ambiguous(group: DimensionGroup, shared: set[tuple[str, int]]) -> DimensionGroup:
    part = next((part for part in group.slices if (part.parameter, part.dim) in shared), None)
    return group if part is None else replace(group, frozen=UNREAD.format(part.parameter))


def _completed(model: nn.Module, unread: dict[str, torch.Size], group: DimensionGroup) -> DimensionGroup:
    suspects = [(name, dim) for name, shape in unread.items() for dim, n in enumerate(shape) if n == group.num_units]
    if group.frozen is not None or not suspects:
        return group
    shapes = _shapes_with_another_size(model, group)
    if shapes is None:
        return replace(
            group,
            frozen=UNREAD.format(suspects[0][0]),
        )
    units = torch.arange(group.num_units).unsqueeze(1)
    own = [(name, dim) for name, dim in suspects if shapes[name][dim] != group.num_units]
    slices = tuple(ParameterSlice(name, dim, units) for name, dim in own)
    gates = tuple(
        ConsumerSlice(name, dim, units, name.rpartition(".")[0]) for name, dim in own if _is_input(model, name, dim)
    )
    weights = sum(unread[name].numel() // unread[name][dim] for name, dim in own)
    return replace(
        group,
        slices=group.slices + slices,
        gates=group.gates + gates,
        parameters_per_unit=group.parameters_per_unit + weights,
    )


def _is_input(model: nn.Module, name: str, dim: int) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Linear) and dim == 1


def _shapes_with_another_size(model: nn.Module, group: DimensionGroup) -> dict[str, torch.Size] | None:
    """Return all shapes of a model whose group is twice as large, or None if no config field makes it so."""
    if not isinstance(model, PreTrainedModel):
        return None
    config: Any = model.config
    for path in integer_fields(config, group.num_units):
        built = build_empty(type(model), edited(config, {path: 2 * group.num_units}))
        shapes = {name: parameter.shape for name, parameter in built.named_parameters()} if built is not None else {}
        if shapes and all(_grows(model, shapes, part) for part in group.slices):
            return shapes
    return None


def _grows(model: nn.Module, shapes: dict[str, torch.Size], part: ParameterSlice) -> bool:
    before = model.get_parameter(part.parameter).shape[part.dim]
    return part.parameter in shapes and shapes[part.parameter][part.dim] - before == part.index.numel()
