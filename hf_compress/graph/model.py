"""``ModelGraph``: everything that recorded forward passes say about a model."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from hf_compress.errors import GraphError, ShrinkError
from hf_compress.graph.accept import check_model
from hf_compress.graph.analysis import analyze
from hf_compress.graph.builder import Builder
from hf_compress.graph.capture import Capture, capture, garbage_collection_paused, mixes_experts, plainly
from hf_compress.graph.costs import Costs
from hf_compress.graph.dims import Dim, atoms, expand, find
from hf_compress.graph.groups import KINDS, DimensionGroup, DimensionGroups
from hf_compress.graph.initialization import with_multiples
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.integers import Attribute, NumericUse, Relation, Size, read
from hf_compress.graph.layers import layer_groups
from hf_compress.graph.matrices import matrices
from hf_compress.graph.solve import Equations
from hf_compress.graph.subsets import CountSite, SubsetSite
from hf_compress.graph.unread import with_unread

MULTIPLES = (1, 2, 4, 8)
"""Numbers of units that are tried together, where forward code takes a part of a size."""


class ModelGraph:
    """What one recorded forward pass says about a model.

    Args:
        model: The model; it is run once in eval mode and left as it was.
        example_inputs: Keyword arguments for ``model.forward``; made from the config by default.

    Raises:
        GraphError: If the forward pass cannot be recorded.
    """

    def __init__(self, model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> None:
        check_model(model, example_inputs)
        with garbage_collection_paused(), plainly(model):
            self._analyze(model, make_example_inputs(model) if example_inputs is None else example_inputs)

    def _analyze(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        recorded = _record(model, inputs)
        self.model = model
        self.analysis = analyze(recorded)
        operands = self.analysis.operands

        def dim_of(size: Relation | Size) -> Dim:
            return operands[size.node].dims[size.dim]

        self.equations = Equations(
            (r for each in recorded for r in each.relations if r.node in operands),
            (use for each in recorded for use in each.numeric_uses),
            dim_of,
            lambda attribute: read(model, attribute),
        )
        self._by_atom = Builder(model, self.analysis, recorded[0]).groups()
        self._atoms = {group.name: atom for atom, group in self._by_atom.items()}
        self._check_sizes()
        groups = with_unread(model, self.analysis.parameters, list(self._by_atom.values()))
        layers = layer_groups(model, recorded[0])
        groups = with_multiples(model, groups) + layers
        self.groups = DimensionGroups(
            sorted(groups, key=lambda group: KINDS.index(group.kind)),
            called=(call.module for each in recorded for call in each.calls),
            matrices=matrices(model, recorded),
        )
        self.costs = Costs(model, self.analysis, recorded[0], self._atoms, layers)

    def attributes_after(self, kept: Mapping[str, int]) -> dict[Attribute, int]:
        """Return the attributes that must change, with their new values.

        Args:
            kept: New number of units by group name.

        Raises:
            ShrinkError: If forward code uses a size in a way that no attribute can mend.
        """
        return self.equations.solve({self._atoms[name]: count for name, count in kept.items() if name in self._atoms})

    def numeric_attributes(self) -> list[Attribute]:
        """Return the integers that forward code computes with; a stock config must keep them as they are."""
        return self.equations.numeric_attributes()

    def _check_sizes(self) -> None:
        """Freeze what forward code could not follow, and find out which groups go together."""
        for atom, group in list(self._by_atom.items()):
            if group.frozen is None:
                self._by_atom[atom] = replace(self._checked(atom, group), subsets=self._with_attributes(atom, group))
        frozen = {group.name: group.frozen for group in self._by_atom.values() if group.frozen is not None}
        for atom, group in self._by_atom.items():
            held = next((name for name in group.tied_to if name in frozen), None)
            if held is not None:
                reason = f"it must keep the same share as {held}, which cannot lose units: {frozen[held]}"
                self._by_atom[atom] = replace(group, frozen=reason, tied_to=())

    def _checked(self, atom: Dim, group: DimensionGroup) -> DimensionGroup:
        """Try to take units away: alone, in multiples, or together with groups that share an integer."""
        first: ShrinkError | None = None
        for multiple in (m for m in MULTIPLES if m < atom.size):
            try:
                self.equations.solve({atom: atom.size - multiple})
            except ShrinkError as error:
                first = first or error
            else:
                return replace(group, multiple_of=math.lcm(multiple, group.multiple_of))
        together = [atom, *self._partners(atom)]
        parts = math.gcd(*(other.size for other in together))
        if parts == 1 or len(together) == 1:
            return replace(group, frozen=str(first))
        try:
            self.equations.solve({other: other.size - other.size // parts for other in together})
        except ShrinkError as error:
            return replace(group, frozen=str(error))
        return replace(group, tied_to=tuple(self._by_atom[other].name for other in together[1:]))

    def _partners(self, atom: Dim) -> list[Dim]:
        """Return the other prunable atoms whose sizes are given by the same attributes."""
        found: dict[Dim, None] = {}
        queue = [atom]
        while queue:
            for need in self.equations.touching(queue.pop()):
                if not isinstance(need.expression, Attribute):
                    continue
                for other in self.equations.using(need.expression):
                    if isinstance(other, NumericUse) or not isinstance(other.expression, Attribute):
                        continue
                    for dim in atoms(self.equations.dim_of(other)):
                        group = self._by_atom.get(dim)
                        same_kind = (
                            group is not None and group.frozen is None and group.kind == self._by_atom[atom].kind
                        )
                        if same_kind and dim is not find(atom) and dim not in found:
                            found[dim] = None
                            queue.append(dim)
        return list(found)

    def _with_attributes(self, atom: Dim, group: DimensionGroup) -> tuple[SubsetSite, ...]:
        """Tell norms and routers which of their integers count units of the group."""
        needs = [
            (need.expression, need)
            for need in self.equations.touching(atom)
            if isinstance(need, Relation) and isinstance(need.expression, Attribute) and need.prefix is None
        ]
        result = []
        for site in group.subsets:
            counts = {}
            for attribute, need in needs:
                if attribute.module == site.module:
                    dim = self.equations.dim_of(need)
                    index = next(part.index for part in expand(dim) if part.atom is find(atom))
                    counts[attribute.path] = CountSite(attribute.path, index, dim.size)
            result.append(replace(site, attributes=tuple(counts.values())))
        return tuple(result)


def _record(model: nn.Module, inputs: Mapping[str, Any]) -> list[Capture]:
    """Record the forward pass, in several ways where one does not show everything."""
    if not mixes_experts(model):
        return [capture(model, inputs)]
    recorded = [capture(model, inputs, "batched_mm")]
    # Batched products show which dimensions are the same whatever tokens choose; grouped ones use the counts of
    # experts that the modules remember. They need a kernel for the device, and aligned sizes.
    with suppress(GraphError):
        recorded.append(capture(model, inputs, "grouped_mm"))
    return recorded


def dimension_groups(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> DimensionGroups:
    """Find every set of coupled parameter slices of ``model`` from one recorded forward pass.

    Args:
        model: Any transformers model; it is run once in eval mode and left as it was.
        example_inputs: Keyword arguments for ``model.forward``; made from the config by default.

    Returns:
        The groups, sorted by kind and in the model's own order; frozen ones carry the reason.

    Raises:
        GraphError: If the forward pass cannot be recorded.
    """
    return ModelGraph(model, example_inputs).groups
