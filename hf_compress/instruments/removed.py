"""Which positions of a parameter belong to units that a gate has closed: they must not count in any range.

What a unit's producer writes is still there while a gate is closed, and the layer that really lacks the unit has other
ranges. Modules are only told, not changed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_hf_compress_removed"


@dataclass(eq=False)
class RemovedUnits:
    """Where the units of one gate lie in a parameter."""

    name: str
    """Of the parameter within its module."""

    dim: int

    factors: Callable[[], Tensor]
    """Returns what each position along ``dim`` is multiplied by; 0: it is gone."""


def tell_removed(module: nn.Module, units: RemovedUnits) -> None:
    """Let a module know about a gate."""
    module.__dict__.setdefault(_ATTRIBUTE, []).append(units)


def untell_removed(module: nn.Module, units: RemovedUnits) -> None:
    """Take back what ``tell_removed`` said; it is no error if it is gone already."""
    known = module.__dict__.get(_ATTRIBUTE, [])
    if units in known:
        known.remove(units)
    if not known:
        forget_removed(module)


def forget_removed(module: nn.Module) -> None:
    """Take back all that was said of a module."""
    module.__dict__.pop(_ATTRIBUTE, None)


def removed_positions(module: nn.Module, name: str, num_dims: int, dim: int | None = None) -> Tensor | None:
    """Return a bool tensor that broadcasts to a parameter, True = removed, or None if no gate is on it.

    Args:
        module: What owns the parameter.
        name: Of the parameter.
        num_dims: Of the parameter.
        dim: Ask for this dimension alone.
    """
    removed: Tensor | None = None
    for units in module.__dict__.get(_ATTRIBUTE, ()):
        if units.name == name and dim in (None, units.dim):
            shape = [1] * num_dims
            shape[units.dim] = -1
            mine = (units.factors().detach() == 0).view(shape)
            removed = mine if removed is None else torch.logical_or(removed, mine)
    return removed
