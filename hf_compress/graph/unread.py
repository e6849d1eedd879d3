"""Parameters that no recorded forward pass reads, but that share the hidden size.

A mask token is read in training alone, an expert only when a token is sent to it. A residual stream must not become
smaller without them. Which of their dimensions go along is found where it is decided: the architecture is built with
another hidden size, on the meta device, and what changes with the group belongs to it.
"""

from collections.abc import Iterable
from dataclasses import replace

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
    growing = _changed_dims(model, group)
    if growing is None:
        return replace(
            group,
            frozen=UNREAD.format(suspects[0][0]),
        )
    units = torch.arange(group.num_units).unsqueeze(1)
    own = [where for where in suspects if where in growing]
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


def _changed_dims(model: nn.Module, group: DimensionGroup) -> set[tuple[str, int]] | None:
    """Return the parameter dimensions that grow with the group, or None if no config field makes it grow.

    The architecture is built twice, with the group's size and with twice as many units. An earlier shrink may have
    left less of it than the config says.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    built = build_empty(type(model), model.config)
    before = _shapes(built)
    units = _units_as_built(model, before, group)
    if units is None:
        return None
    for path in integer_fields(model.config, units):
        after = _shapes(build_empty(type(model), edited(model.config, {path: 2 * units})))
        if after and all(_grows(before, after, part, units) for part in group.slices):
            return {
                (name, dim)
                for name, shape in before.items()
                for dim in range(len(shape))
                if name in after and shape[dim] != after[name][dim]
            }
    return None


def _shapes(built: nn.Module | None) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in built.named_parameters()} if built is not None else {}


def _units_as_built(model: nn.Module, before: dict[str, torch.Size], group: DimensionGroup) -> int | None:
    """Return how many units the architecture gives a group, from a dimension that holds nothing else."""
    for part in group.slices:
        alone = part.index.shape[1] == 1 and model.get_parameter(part.parameter).shape[part.dim] == group.num_units
        if alone and part.parameter in before:
            return before[part.parameter][part.dim]
    return None


def _grows(before: dict[str, torch.Size], after: dict[str, torch.Size], part: ParameterSlice, units: int) -> bool:
    if part.parameter not in before or part.parameter not in after:
        return False
    grown = after[part.parameter][part.dim] - before[part.parameter][part.dim]
    return grown == units * part.index.shape[1]
