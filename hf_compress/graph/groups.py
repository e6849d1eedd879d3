"""Dimension groups: every set of parameter slices that must be removed together, and which of them may be."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.graph.subsets import SubsetSite

KINDS = ("heads", "ffn", "hidden", "head_dim", "experts", "layers", "vocab", "other")
"""In the order in which groups are listed."""


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """The part of one parameter that belongs to the units of a group."""

    parameter: str
    """Full name of the parameter."""

    dim: int
    """The parameter dimension along which the units lie."""

    index: Tensor
    """Long tensor [num_units, k]: positions along ``dim`` that each unit owns."""


@dataclass(frozen=True, eq=False)
class ConsumerSlice(ParameterSlice):
    """A parameter slice where a zero removes the unit's effect exactly, and who reads it."""

    module: str
    """Name of the module that computes with it: another than the parameter's own where weights are tied, or where a
    module takes the weights of one inside."""


@dataclass(frozen=True)
class BlockSite:
    """A module that computes attention for one group of heads."""

    module: str

    output: str | None
    """Name within the module of the Linear that reads the heads; None if it is outside."""

    length: int | None
    """How many results the module returns in a tuple; None if it returns one tensor."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DimensionGroup:
    """Coupled parameter slices: unit ``u`` of the group is all of their rows ``index[u]``.

    For the feed-forward part of a BERT layer, for example, unit 3 is row 3 of the first Linear's weight and bias
    and column 3 of the second Linear's weight.
    """

    kind: str
    """``heads``, ``ffn``, ``hidden``, ``head_dim``, ``experts``, ``layers``, ``vocab`` or ``other``."""

    name: str
    """Unique in the model: the common module and the kind, such as ``bert.encoder.layer.0.ffn``."""

    num_units: int
    """How many units there are."""

    slices: tuple[ParameterSlice, ...] = ()
    """Every parameter slice that goes when a unit goes; none for layers, see ``modules``."""

    gates: tuple[ConsumerSlice, ...] = ()
    """The slices through which the units act on the rest."""

    sources: tuple[ConsumerSlice, ...] = ()
    """The slices that produce the units, where two activations are contracted with each other (query and key)."""

    subsets: tuple[SubsetSite, ...] = ()
    """Norms and routers, which must see the kept units alone."""

    modules: tuple[str, ...] = ()
    """For layers: the module of each unit."""

    handed_on: tuple[str, ...] = ()
    """For layers: modules of the first one that the next takes over when it becomes the first (T5's position bias)."""

    buffers: tuple[ParameterSlice, ...] = ()
    """Buffers that are sliced along."""

    frozen: str | None = None
    """Why no unit may be removed, or None."""

    tied_to: tuple[str, ...] = ()
    """Groups that must keep the same share of units, because forward code has one integer for all of them."""

    fixed_units: tuple[int, ...] = ()
    """Units that must stay."""

    min_units: int = 1
    """Fewest units that must stay: a router that picks two experts needs two, a whole attention block can go."""

    block: BlockSite | None = None
    """For heads that can all go: the module that computes their attention."""

    multiple_of: int = 1
    """Kernels that need aligned sizes take only multiples of this many units."""

    parameters_per_unit: int = 0
    """Number of weights that go with one unit."""

    def conditions(self) -> str:
        """Say whether units may go, and which: the last column of the table."""
        if self.frozen is not None:
            return f"no: {self.frozen}"
        others = f" and {len(self.tied_to) - 1} others" if len(self.tied_to) > 1 else ""
        notes = [
            f"the same share as {self.tied_to[0]}{others}" if self.tied_to else "",
            f"multiples of {self.multiple_of}" if self.multiple_of > 1 else "",
            f"at least {self.min_units} stay" if self.min_units > 1 else "",
            f"units {', '.join(map(str, self.fixed_units))} stay" if self.fixed_units else "",
        ]
        told = "; ".join(note for note in notes if note)
        return f"yes ({told})" if told else "yes"


class DimensionGroups(list[DimensionGroup]):
    """A list of groups that prints as a table.

    Args:
        groups: The groups.
        called: See the attribute.
        matrices: See the attribute.
    """

    def __init__(
        self,
        groups: Iterable[DimensionGroup] = (),
        called: Iterable[str] = (),
        matrices: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(groups)
        self.called = frozenset(called)
        """Names of the modules that the recorded forward pass called; the weights of others may be read directly."""

        self.matrices = dict(matrices or {})
        """Number of weights of every parameter of two dimensions or more that enters a product, by name."""

    def __str__(self) -> str:
        rows = [("kind", "name", "units", "weights/unit", "prunable")]
        rows += [(g.kind, g.name, str(g.num_units), str(g.parameters_per_unit), g.conditions()) for g in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        )


def within(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter or module is one of some modules, or inside of one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))


def unit_of_position(part: ParameterSlice, size: int) -> Tensor:
    """Return which unit owns each position along the slice's dimension.

    Args:
        part: A slice of a group.
        size: The parameter's size along ``part.dim``.

    Returns:
        Long tensor [size]: the owning unit, or ``num_units`` where no unit of the group does.
    """
    num_units, per_unit = part.index.shape
    owner = torch.full((size,), num_units, dtype=torch.long)
    owner[part.index.reshape(-1)] = torch.arange(num_units).repeat_interleave(per_unit)
    return owner
