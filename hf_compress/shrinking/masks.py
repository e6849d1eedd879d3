"""Masks as they come from anywhere, turned into one per dimension group."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_compress.errors import ShrinkError, TargetError, choices
from hf_compress.graph.groups import DimensionGroup


def unit_masks(
    model: nn.Module, groups: Mapping[str, DimensionGroup], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check masks and turn them into one per group.

    Args:
        model: The model.
        groups: Its groups by name.
        masks: By group name [num_units] or by parameter name (the parameter's shape); True = keep.

    Returns:
        By group name: bool tensor [num_units] on the CPU.

    Raises:
        ShrinkError: If a mask is malformed, covers no whole unit, or leaves too few units.
        TargetError: If it names nothing, or asks for units that must stay.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name in groups:
            found = {name: _check_mask(name, mask, (groups[name].num_units,))}
        elif name in parameters:
            found = _from_parameter_mask(groups, name, _check_mask(name, mask, tuple(parameters[name].shape)))
        else:
            known = [*groups, *parameters]
            raise TargetError(f"masks[{name!r}]: no such dimension group or parameter; {_closest(name, known)}.")
        for group_name, keep in found.items():
            wanted[group_name] = wanted[group_name] & keep if group_name in wanted else keep
    for name, keep in wanted.items():
        group = groups[name]
        if not keep.all() and group.frozen is not None:
            raise TargetError(f"masks: group {name!r} cannot lose units: {group.frozen}.")
        missing = [unit for unit in group.fixed_units if not keep[unit]]
        if missing:
            raise TargetError(
                f"masks[{name!r}]: unit {missing[0]} cannot be removed; units that must stay: {group.fixed_units}."
            )
        if not keep.any() and group.min_units > 0:
            raise ShrinkError(f"masks[{name!r}]: removes all {group.num_units} units; keep at least one.")
        if int(keep.sum()) < group.min_units:
            raise ShrinkError(
                f"masks[{name!r}]: keeps {int(keep.sum())} of {group.num_units} units; at least {group.min_units} are "
                "needed, because so many are chosen for every token."
            )
    return wanted


def _closest(name: str, known: list[str]) -> str:
    text = choices(name, known)
    return text.split("; allowed")[0] if text.startswith("closest") else "dimension_groups(model) lists the groups"


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ShrinkError(f"masks[{name!r}]: got {given}; allowed: torch.bool {shape}, True = keep.")
    if mask.is_meta:
        raise ShrinkError(f"masks[{name!r}]: is on the meta device and has no values; pass a real tensor.")
    return mask.detach().cpu()


def _from_parameter_mask(groups: Mapping[str, DimensionGroup], name: str, mask: Tensor) -> dict[str, Tensor]:
    """A unit goes if all that it owns of the masked parameter is masked."""
    found: dict[str, Tensor] = {}
    for group in groups.values():
        for part in group.slices:
            if part.parameter != name or group.frozen is not None:
                continue
            rows = mask.movedim(part.dim, 0).reshape(mask.shape[part.dim], -1).any(dim=1)
            keep = rows[part.index].any(dim=1)
            if not keep.all():
                found[group.name] = keep & found.get(group.name, torch.tensor(True))
    if not found and not mask.all():
        raise ShrinkError(
            f"masks[{name!r}]: masks {int((~mask).sum())} weights but no whole unit of a prunable group, so nothing "
            "can be removed. Mask whole rows, columns or heads, or pass masks by group name."
        )
    return found
