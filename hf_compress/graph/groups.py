"""Dimension groups: every set of parameter slices that must be removed together, and which of them may be."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.graph.analysis import Analysis, analyze
from hf_compress.graph.capture import capture
from hf_compress.graph.dims import Dim, atoms, expand, find
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.integers import Attribute, read
from hf_compress.graph.op_rules import Mark
from hf_compress.graph.solve import Equations

FREEZING_ROLES = {
    "averaged": "its positions are averaged by {op}{where}",
    "conflict": "{op}{where} uses it in two ways that cannot be made one",
    "contracted_activations": "{op}{where} contracts it between two activations",
    "convolution_group": "{op}{where} ties it to convolution groups",
    "indexed": "{op}{where} looks its positions up by number",
    "input": "it is a dimension of {op}",
    "kernel": "it is a kernel size of {op}{where}",
    "no_rule": "{op}{where} has no op rule; add one with hf_compress.graph.op_rules.op_rule",
    "normalized": "{op}{where} normalizes over it, so removing units changes the others",
    "opaque": "{op}{where} is used in a form that is not understood",
    "output": "it is a dimension of {op}",
    "position_dependent": "{op}{where} makes its content from the position",
    "ranked": "{op}{where} ranks its positions",
    "reduced": "its positions are reduced by {op}{where}",
    "selected": "{op}{where} picks single positions",
    "softmax": "{op}{where} normalizes over it",
    "spatial": "it is a spatial size of {op}{where}",
    "wrong_rule": "the op rule of {op} gave dimensions that do not fit its result{where}",
}
"""Roles that forbid removal of single units, with the reason given to users."""


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
class DimensionGroup:
    """Coupled parameter slices: unit ``u`` of the group is all of their rows ``index[u]``.

    For the feed-forward part of a BERT layer, for example, unit 3 is row 3 of the first Linear's weight and bias
    and column 3 of the second Linear's weight.
    """

    kind: str
    """``heads``, ``ffn``, ``hidden``, ``head_dim``, ``vocab`` or ``other``."""

    name: str
    """Unique in the model: the common module and the kind, such as ``bert.encoder.layer.0.ffn``."""

    num_units: int
    """How many units there are."""

    slices: tuple[ParameterSlice, ...]
    """Every parameter slice that goes when a unit goes."""

    gates: tuple[ParameterSlice, ...]
    """The slices that are contracted with activations: a zero there removes the unit's effect exactly."""

    buffers: tuple[ParameterSlice, ...] = ()
    """Buffers that are sliced along."""

    frozen: str | None = None
    """Why no unit may be removed, or None."""

    parameters_per_unit: int = 0
    """Number of weights that go with one unit."""


class DimensionGroups(list[DimensionGroup]):
    """A list of groups that prints as a table."""

    def __str__(self) -> str:
        rows = [("kind", "name", "units", "weights/unit", "prunable")]
        rows += [
            (g.kind, g.name, str(g.num_units), str(g.parameters_per_unit), f"no: {g.frozen}" if g.frozen else "yes")
            for g in self
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        )


class ModelGraph:
    """What one recorded forward pass says about a model.

    Args:
        model: The model; it is run once in eval mode and left as it was.
        example_inputs: Keyword arguments for ``model.forward``; made from the config by default.

    Raises:
        GraphError: If the forward pass cannot be recorded.
    """

    def __init__(self, model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> None:
        inputs = make_example_inputs(model) if example_inputs is None else example_inputs
        recorded = capture(model, inputs)
        self.model = model
        self.relations = recorded.relations
        self.analysis = analyze(recorded)
        self.groups, self._atoms = _Builder(model, self.analysis).groups()

    def attributes_after(self, kept: Mapping[str, int]) -> dict[Attribute, int]:
        """Return the attributes that must change, with their new values.

        Args:
            kept: New number of units by group name.

        Raises:
            ShrinkError: If forward code uses a size in a way that no attribute can mend.
        """
        by_atom = {find(self._atoms[name]): count for name, count in kept.items()}
        dims = self.analysis.dims
        relations = [r for r in self.relations if r.node in dims]
        return Equations(relations, lambda r: dims[r.node][r.dim], lambda a: read(self.model, a), by_atom).solve()


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


class _Builder:
    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.model = model
        self.analysis = analysis
        self.tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        self.buffer_names = {name for name, _ in model.named_buffers()}
        self.consumers = {(c.parameter, c.dim) for c in analysis.consumers}
        self.marks: dict[Dim, dict[str, Mark]] = defaultdict(dict)
        for mark in analysis.marks:
            for atom in atoms(mark.dim):
                self.marks[atom].setdefault(mark.role, mark)
        self.slices: dict[Dim, list[ParameterSlice]] = defaultdict(list)
        self.terms: dict[tuple[str, int], Dim] = {}
        order = {name: position for position, name in enumerate(self.tensors)}
        for name in sorted(analysis.parameters, key=order.__getitem__):
            for dim, term in enumerate(analysis.parameters[name]):
                self.terms[name, dim] = find(term)
                for part in expand(term):
                    self.slices[part.atom].append(ParameterSlice(name, dim, part.index))
        self.hidden = {atom for atom in self.slices if self._is_hidden(atom)}

    def groups(self) -> tuple[DimensionGroups, dict[str, Dim]]:
        """Return the groups, and the atom behind each by name."""
        found = [(self._group(atom), atom) for atom, slices in self.slices.items() if self._is_group(atom, slices)]
        counts: dict[str, int] = defaultdict(int)
        named, behind = DimensionGroups(), {}
        order = ("heads", "ffn", "hidden", "head_dim", "vocab", "other")
        for group, atom in sorted(found, key=lambda pair: order.index(pair[0].kind)):
            counts[group.name] += 1
            suffix = "" if counts[group.name] == 1 else f".{counts[group.name]}"
            named.append(replace(group, name=group.name + suffix))
            behind[named[-1].name] = atom
        return named, behind

    def _is_group(self, atom: Dim, slices: list[ParameterSlice]) -> bool:
        return atom.size > 1 and any(s.parameter not in self.buffer_names for s in slices)

    def _group(self, atom: Dim) -> DimensionGroup:
        slices = tuple(s for s in self.slices[atom] if s.parameter not in self.buffer_names)
        kind = self._kind(atom)
        gates = tuple(s for s in slices if (s.parameter, s.dim) in self.consumers)
        prefix = _common_module([s.parameter for s in slices])
        weights = sum(s.index.shape[1] * self._numel_across(s) for s in slices)
        return DimensionGroup(
            kind=kind,
            name=f"{prefix}.{kind}" if prefix else kind,
            num_units=atom.size,
            slices=slices,
            gates=gates,
            buffers=tuple(s for s in self.slices[atom] if s.parameter in self.buffer_names),
            frozen=self._reason(atom, gates),
            parameters_per_unit=weights,
        )

    def _numel_across(self, part: ParameterSlice) -> int:
        tensor = self.tensors[part.parameter]
        return tensor.numel() // tensor.shape[part.dim]

    def _reason(self, atom: Dim, gates: tuple[ParameterSlice, ...]) -> str | None:
        for role, text in FREEZING_ROLES.items():
            mark = self.marks[atom].get(role)
            if mark is not None:
                return text.format(op=mark.op, where=f" in {mark.module}" if mark.module else "")
        return None if gates else "no parameter consumes it, so what its units do cannot be switched off"

    def _kind(self, atom: Dim) -> str:
        if self._shares_dimension_with_heads(atom):
            return "other" if "heads" in self.marks[atom] else "head_dim"
        if "heads" in self.marks[atom]:
            return "heads"
        if atom in self.hidden:
            return "hidden"
        if self._is_vocabulary(atom):
            return "vocab"
        return "ffn" if self._is_feed_forward(atom) else "other"

    def _shares_dimension_with_heads(self, atom: Dim) -> bool:
        """Whether units of ``atom`` lie within heads: head_dim, or the query heads that share one key head."""
        mine = {(s.parameter, s.dim): s.index.numel() for s in self.slices[atom]}
        for other in self.slices:
            if other is atom or "heads" not in self.marks[other]:
                continue
            theirs = {(s.parameter, s.dim): s.index.numel() for s in self.slices[other]}
            # Key heads lie along queries, keys and values; the repetition of queries along queries alone.
            inside = "heads" not in self.marks[atom] or sum(theirs.values()) > sum(mine.values())
            if inside and mine.keys() & theirs.keys():
                return True
        return False

    def _is_hidden(self, atom: Dim) -> bool:
        """A residual stream is normalized and is both what layers read and what they write."""
        roles = self.marks[atom]
        if "heads" in roles or not {"normalized", "averaged"} & roles.keys():
            return False
        matrices = [s for s in self.slices[atom] if self.tensors[s.parameter].dim() > 1]
        reads = any((s.parameter, s.dim) in self.consumers for s in matrices)
        return reads and any((s.parameter, s.dim) not in self.consumers for s in matrices)

    def _is_vocabulary(self, atom: Dim) -> bool:
        try:
            weight = getattr(self.model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return False  # models without text, or with several vocabularies
        return weight is not None and any(self.tensors[s.parameter] is weight and s.dim == 0 for s in self.slices[atom])

    def _is_feed_forward(self, atom: Dim) -> bool:
        """Reads the residual stream, writes to it, and holds its units in single rows in between."""
        into = [s for s in self.slices[atom] if (s.parameter, s.dim) not in self.consumers]
        out = [s for s in self.slices[atom] if (s.parameter, s.dim) in self.consumers]
        matrices = [s for s in into + out if self.tensors[s.parameter].dim() > 1]
        ends = any(self._touches_hidden(s) for s in into) and any(self._touches_hidden(s) for s in out)
        return ends and all(self._touches_hidden(s) for s in matrices)

    def _touches_hidden(self, part: ParameterSlice) -> bool:
        others = [i for i in range(self.tensors[part.parameter].dim()) if i != part.dim]
        return any(self.terms[part.parameter, i] in self.hidden for i in others)


def _common_module(parameters: list[str]) -> str:
    paths = [name.split(".")[:-1] for name in parameters]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


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
