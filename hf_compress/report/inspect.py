"""What can be pruned in a model, as a table: groups, how much of the model they are, and what is frozen and why."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import TargetError, choices
from hf_compress.graph.groups import DimensionGroup, DimensionGroups

HEADER = ("kind", "name", "units", "weights/unit", "share", "prunable")
LEFT_ALIGNED = ("kind", "name", "prunable")
NUMBER = re.compile(r"(?<=\.)\d+(?=\W|$)")
"""A number among the parts of a module's name."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many weights belong to some groups."""

    groups: int
    """Number of groups."""

    units: int
    """Their units, all together."""

    parameters: int
    """Weights in at least one of their units; each counts once."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The dimension groups of a model, with their shares of its weights.

    A weight lies in several dimensions: a row and a column of its matrix, say. The shares of groups overlap therefore.
    """

    model_class: str
    """Class of the model."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter by name; tied ones once."""

    groups: DimensionGroups
    """The groups that were asked for."""

    seconds: float
    """Wall time of building and analyzing the model."""

    @property
    def parameters(self) -> int:
        """Number of weights of the model."""
        return sum(map(prod, self.shapes.values()))

    def share(self, groups: Sequence[DimensionGroup]) -> float:
        """Return the fraction of all weights that belong to a unit of at least one of the groups."""
        return _covered(self.shapes, groups) / self.parameters

    def prunable(self) -> dict[str, Coverage]:
        """Return what belongs to prunable groups by kind; ``"all"`` stands for all kinds together."""
        found: dict[str, list[DimensionGroup]] = {}
        for group in self.groups:
            if group.frozen is None:
                found.setdefault(group.kind, []).append(group)
        found["all"] = [group for some in found.values() for group in some]
        return {
            kind: Coverage(
                groups=len(some),
                units=sum(group.num_units for group in some),
                parameters=_covered(self.shapes, some),
            )
            for kind, some in found.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings: every group, none collapsed."""
        return {
            "model_class": self.model_class,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 3),
            "prunable": {kind: asdict(coverage) for kind, coverage in self.prunable().items()},
            "groups": [
                {
                    "kind": group.kind,
                    "name": group.name,
                    "num_units": group.num_units,
                    "parameters_per_unit": group.parameters_per_unit,
                    "share": self.share([group]),
                    "frozen": group.frozen,
                }
                for group in self.groups
            ],
        }

    def table(self, *, collapse: bool = True) -> str:
        """Return the groups as lines of text.

        Args:
            collapse: One line for groups that differ only in the number of their layer.
        """
        rows = [_Row.of(group) for group in self.groups]
        lines = [row.cells(self.share(row.groups)) for row in (_collapsed(rows) if collapse else rows)]
        return _aligned([HEADER, *lines])

    def summary(self) -> str:
        """Say in one line how much can be pruned, by kind."""
        total, prunable = self.parameters, self.prunable()
        kinds = [
            f"{kind} {_with_share(c.parameters, total)} in {c.groups} group{'s' if c.groups > 1 else ''}"
            for kind, c in prunable.items()
            if kind != "all"
        ]
        what = f"{_with_share(prunable['all'].parameters, total)} can be pruned ({'; '.join(kinds)})"
        return (
            f"{self.model_class}: {total:,} parameters, {what if kinds else 'none can be pruned'}; "
            f"analyzed in {self.seconds:.1f} s"
        )


def inspect_groups(
    model: nn.Module, groups: DimensionGroups, *, kinds: Sequence[str] = (), seconds: float = 0.0
) -> Inspection:
    """Put the groups of a model together with its sizes.

    Args:
        model: The model; it may be on the meta device.
        groups: Its dimension groups.
        kinds: Kinds of groups to look at; all by default.
        seconds: How long the analysis took.

    Raises:
        TargetError: If the model has no group of one of the kinds.
    """
    present = {group.kind for group in groups}
    for kind in kinds:
        if kind not in present:
            raise TargetError(
                f"inspect: {type(model).__name__} has no groups of kind {kind!r}; {choices(kind, present)}."
            )
    return Inspection(
        model_class=type(model).__name__,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        groups=DimensionGroups(group for group in groups if not kinds or group.kind in kinds),
        seconds=seconds,
    )


def _covered(shapes: Mapping[str, tuple[int, ...]], groups: Iterable[DimensionGroup]) -> int:
    """Count the weights that belong to a unit of at least one group."""
    owned: dict[str, dict[int, Tensor]] = {}
    whole: dict[str, None] = {}  # of layers
    for group in groups:
        prefixes = tuple(f"{module}." for module in group.modules)
        whole.update(dict.fromkeys(name for name in shapes if prefixes and name.startswith(prefixes)))
        for part in group.slices:
            dims = owned.setdefault(part.parameter, {})
            mask = dims.setdefault(part.dim, torch.zeros(shapes[part.parameter][part.dim], dtype=torch.bool))
            mask[part.index.reshape(-1)] = True
    count = sum(prod(shapes[name]) for name in whole)
    for name, dims in owned.items():
        if name in whole:
            continue
        # A weight is free of all groups if its position along every dimension is.
        free = [size - int(dims[dim].sum()) if dim in dims else size for dim, size in enumerate(shapes[name])]
        count += prod(shapes[name]) - prod(free)
    return count


@dataclass(frozen=True)
class _Row:
    """A line of the table: one group, or several whose names differ in a number."""

    groups: tuple[DimensionGroup, ...]
    """Groups of one kind and size."""

    parts: tuple[str | tuple[int, ...], ...]
    """Parts of the name; all the numbers where a part is one."""

    frozen: str | None
    """Why units may not be removed; ``*`` stands for the number of a layer."""

    @classmethod
    def of(cls, group: DimensionGroup) -> "_Row":
        parts = tuple((int(part),) if part.isdecimal() else part for part in group.name.split("."))
        return cls((group,), parts, group.frozen)

    def key(self, position: int) -> object:
        """Return what must be equal for rows that become one along a position of their names."""
        group = self.groups[0]
        others = (*self.parts[:position], None, *self.parts[position + 1 :])
        return group.kind, others, group.num_units, group.parameters_per_unit, _without_numbers(self.frozen)

    def merged(self, other: "_Row", position: int) -> "_Row":
        numbers = tuple(n for row in (self, other) for n in row.parts[position] if isinstance(n, int))
        parts = (*self.parts[:position], numbers, *self.parts[position + 1 :])
        frozen = self.frozen if self.frozen == other.frozen else _without_numbers(self.frozen)
        return _Row((*self.groups, *other.groups), parts, frozen)

    def cells(self, share: float) -> tuple[str, ...]:
        group = self.groups[0]
        name = ".".join(part if isinstance(part, str) else _numbers(part) for part in self.parts)
        units = f"{group.num_units}" if len(self.groups) == 1 else f"{len(self.groups)} x {group.num_units}"
        conditions = group.conditions() if len(self.groups) == 1 else NUMBER.sub("*", group.conditions())
        prunable = conditions if self.frozen is None else f"no: {self.frozen}"
        return group.kind, name, units, f"{group.parameters_per_unit}", f"{share:.1%}", prunable


def _without_numbers(reason: str | None) -> str | None:
    return None if reason is None else NUMBER.sub("*", reason)


def _collapsed(rows: Sequence[_Row]) -> list[_Row]:
    """Make one row of those that differ only in a number of their names, for one number after the other."""
    found = list(rows)
    for position in range(max((len(row.parts) for row in rows), default=0)):
        merged: dict[object, _Row] = {}
        for row in found:
            numbered = position < len(row.parts) and isinstance(row.parts[position], tuple)
            key = row.key(position) if numbered else row
            merged[key] = merged[key].merged(row, position) if numbered and key in merged else row
        found = list(merged.values())
    return found


def _numbers(numbers: tuple[int, ...]) -> str:
    """Write numbers as ranges: ``{0..3,5}``; a single one as itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = zip(row, widths, HEADER, strict=True)
        text = [cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width) for cell, width, name in cells]
        lines.append("  ".join(text).rstrip())
    return "\n".join(lines)


def _with_share(parameters: int, total: int) -> str:
    return f"{parameters:,} ({parameters / total:.1%})"
