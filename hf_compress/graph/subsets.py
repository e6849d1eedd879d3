"""Modules that look at all units together, and so have to be run on the kept ones alone: norms and routers.

LayerNorm and RMSNorm take statistics over the hidden size, a router ranks its experts. With units zeroed instead of
removed, they would compute something else than in the smaller model. They are found by what they do: a module without
children whose operators reduce or rank a dimension that it reads from its inputs and writes to its outputs.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from hf_compress.graph.capture import ModuleCall
from hf_compress.graph.dims import Dim, atoms, expand
from hf_compress.graph.op_rules import Operand


@dataclass(frozen=True, eq=False)
class TensorSite:
    """Where the units of a group lie in a tensor that a module takes or gives."""

    position: int
    """Number of the tensor among the arguments (keyword arguments last) or results."""

    dim: int | None
    """The dimension, counted from the end (-1 is the last); None if the tensor's integers are positions along one."""

    index: Tensor
    """Long tensor [num_units, k]: positions along that dimension that each unit owns."""

    size: int
    """The size of that dimension."""


@dataclass(frozen=True, eq=False)
class CountSite:
    """An integer of a module that counts positions, some of which belong to units."""

    path: tuple[str | int, ...]
    """Attribute names from the module on; an int is a position in a tuple or list."""

    index: Tensor
    """Long tensor [num_units, k]: which of the counted positions each unit owns."""

    size: int
    """How many positions there are."""


@dataclass(frozen=True, eq=False)
class SubsetSite:
    """A module that is to be run on the kept units of a group."""

    module: str
    inputs: tuple[TensorSite, ...]
    outputs: tuple[TensorSite, ...]
    attributes: tuple["CountSite", ...] = ()
    """Integers of the module that are sizes of tensors along which units lie."""


class SubsetFinder:
    """Finds the modules that can be run on a part of a dimension.

    Args:
        model: The analyzed model.
        calls: Its recorded module calls.
        operands: Every recorded tensor.
    """

    def __init__(self, model: nn.Module, calls: Iterable[ModuleCall], operands: dict[fx.Node, Operand]) -> None:
        self.model = model
        self.operands = operands
        self._calls: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in calls:
            self._calls[call.module].append(call)

    def find(self, module: str, atom: Dim) -> SubsetSite | None:
        """Return how ``module`` reads and writes the units of ``atom``, or None if it is no such module."""
        calls = self._calls.get(module)
        if not module or not calls or any(True for _ in self.model.get_submodule(module).children()):
            return None
        found = [(self._sites(call.inputs, atom), self._sites(call.outputs, atom)) for call in calls]
        inputs, outputs = found[0]
        if not outputs or any(_shape_of(other) != _shape_of(found[0]) for other in found[1:]):
            return None
        return SubsetSite(module, inputs, outputs)

    def _sites(self, nodes: list[fx.Node | None], atom: Dim) -> tuple[TensorSite, ...]:
        found = []
        for position, node in enumerate(nodes):
            operand = self.operands.get(node) if node is not None else None
            if operand is None:
                continue
            if operand.values is not None and atom in atoms(operand.values):
                found.append(TensorSite(position, None, _positions(operand.values, atom), operand.values.size))
            for dim, term in enumerate(operand.dims):
                if atom in atoms(term):
                    found.append(TensorSite(position, dim - len(operand.dims), _positions(term, atom), term.size))
        return tuple(found)


def _positions(term: Dim, atom: Dim) -> Tensor:
    return next(part.index for part in expand(term) if part.atom is atom)


def _shape_of(sites: tuple[tuple[TensorSite, ...], tuple[TensorSite, ...]]) -> list[tuple[int, int | None]]:
    return [(site.position, site.dim) for part in sites for site in part]
