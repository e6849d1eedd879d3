"""From terms and roles to dimension groups."""

from collections import defaultdict
from dataclasses import replace

from torch import Tensor, nn

from hf_compress.graph.analysis import Analysis, live_nodes
from hf_compress.graph.blocks import find_block
from hf_compress.graph.capture import Capture
from hf_compress.graph.dims import Dim, atoms, expand, find
from hf_compress.graph.groups import KINDS, BlockSite, ConsumerSlice, DimensionGroup, ParameterSlice
from hf_compress.graph.op_rules import Mark
from hf_compress.graph.roles import FREEZING_ROLES, SUBSET_ROLES
from hf_compress.graph.subsets import SubsetFinder, SubsetSite

GROUPED_MM_BYTES = 16
"""Grouped matrix products of experts need rows whose bytes are a multiple of this."""

WITHOUT_EFFECT = "no parameter consumes it, so what its units do cannot be switched off"


class Builder:
    """Turns the atoms of a model's parameters into groups.

    Args:
        model: The analyzed model.
        analysis: What its operators say.
        recorded: The forward pass that shows the model's modules at work.
    """

    def __init__(self, model: nn.Module, analysis: Analysis, recorded: Capture) -> None:
        self.model = model
        self.analysis = analysis
        self.calls = calls = recorded.calls
        self.live = live_nodes(recorded)
        self.readers = {
            name: dict.fromkeys(str(user.meta["module"]) for user in node.users if user.op == "call_function")
            for name, node in recorded.parameters.items()
        }
        self.subsets = SubsetFinder(model, calls, analysis.operands)
        self.tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        self.buffer_names = {name for name, _ in model.named_buffers()}
        self.consumers: dict[tuple[str, int], list[str]] = defaultdict(list)
        for consumer in analysis.consumers:
            self.consumers[consumer.parameter, consumer.dim].append(consumer.module)
        self.marks: dict[Dim, dict[str, dict[str, Mark]]] = defaultdict(lambda: defaultdict(dict))
        for mark in analysis.marks:
            for atom in atoms(mark.dim):
                self.marks[atom][mark.role].setdefault(mark.module, mark)
        self.slices: dict[Dim, list[ParameterSlice]] = defaultdict(list)
        self.terms: dict[tuple[str, int], Dim] = {}
        order = {name: position for position, name in enumerate(self.tensors)}
        for name in sorted(analysis.parameters, key=order.__getitem__):
            for dim, term in enumerate(analysis.parameters[name]):
                self.terms[name, dim] = find(term)
                for part in expand(term):
                    self.slices[part.atom].append(ParameterSlice(name, dim, part.index))
        self.hidden = {atom for atom in self.slices if self._is_hidden(atom)}
        self.inside_heads = self._atoms_inside_heads()

    def groups(self) -> dict[Dim, DimensionGroup]:
        """Return the group of every atom that is a unit space of parameters, in the order of listing."""
        found = [(atom, self._group(atom)) for atom, slices in self.slices.items() if self._is_group(atom, slices)]
        counts: dict[str, int] = defaultdict(int)
        named = {}
        for atom, group in sorted(found, key=lambda pair: KINDS.index(pair[1].kind)):
            counts[group.name] += 1
            suffix = "" if counts[group.name] == 1 else f".{counts[group.name]}"
            named[atom] = replace(group, name=group.name + suffix)
        return named

    def _is_group(self, atom: Dim, slices: list[ParameterSlice]) -> bool:
        return atom.size > 1 and any(s.parameter not in self.buffer_names for s in slices)

    def _group(self, atom: Dim) -> DimensionGroup:
        slices = tuple(s for s in self.slices[atom] if s.parameter not in self.buffer_names)
        kind = self._kind(atom)
        gates = tuple(
            ConsumerSlice(s.parameter, s.dim, s.index, module)
            for s in slices
            for module in self.consumers.get((s.parameter, s.dim), ())
        )
        sources: tuple[ConsumerSlice, ...] = ()
        if "contracted_activations" in self.marks[atom]:
            sources = tuple(
                ConsumerSlice(s.parameter, s.dim, s.index, module)
                for s in slices
                if (s.parameter, s.dim) not in self.consumers
                for module in self.readers.get(s.parameter, ())
            )
        subsets, frozen = self._subsets(atom)
        prefix = common_module([s.parameter for s in slices])
        ranked = [mark.amount for mark in self.marks[atom]["ranked"].values()]
        block = None if subsets else self._block(atom, kind, slices, gates)
        return DimensionGroup(
            kind=kind,
            name=f"{prefix}.{kind}" if prefix else kind,
            num_units=atom.size,
            slices=slices,
            gates=gates,
            sources=sources,
            subsets=tuple(subsets),
            buffers=tuple(s for s in self.slices[atom] if s.parameter in self.buffer_names),
            frozen=self._frozen(atom, kind, gates or sources) or frozen,
            min_units=max([0 if block or self._may_be_empty(kind, slices, subsets) else 1, *ranked]),
            block=block,
            multiple_of=self._alignment(slices),
            parameters_per_unit=sum(s.index.shape[1] * self._numel_across(s) for s in slices),
        )

    def _frozen(self, atom: Dim, kind: str, reads: tuple[ConsumerSlice, ...]) -> str | None:
        reason = self._reason(atom)
        if reason is not None and kind == "vocab":
            return f"{reason}; prune_vocabulary removes rows that no text uses"
        return reason or (None if reads or kind == "experts" else WITHOUT_EFFECT)

    def _block(
        self, atom: Dim, kind: str, slices: tuple[ParameterSlice, ...], gates: tuple[ConsumerSlice, ...]
    ) -> BlockSite | None:
        if kind == "heads":
            places = list(self.marks[atom]["heads"])
        elif kind == "ffn" and not self._is_linear(slices):
            places = [common_module([part.parameter for part in slices])]
        else:
            return None
        return find_block(self.model, self.calls, self.live, places[0], gates) if len(places) == 1 else None

    def _is_linear(self, slices: tuple[ParameterSlice, ...]) -> bool:
        owners = (part.parameter.rpartition(".")[0] for part in slices)
        return all(isinstance(self.model.get_submodule(owner), nn.Linear) for owner in owners)

    def _may_be_empty(self, kind: str, slices: tuple[ParameterSlice, ...], subsets: list[SubsetSite]) -> bool:
        """Whether layers without any units work: those of a feed-forward part do, a norm over nothing does not."""
        return kind == "ffn" and not subsets and self._is_linear(slices)

    def _numel_across(self, part: ParameterSlice) -> int:
        tensor = self.tensors[part.parameter]
        return tensor.numel() // tensor.shape[part.dim]

    def _reason(self, atom: Dim) -> str | None:
        for role, text in FREEZING_ROLES.items():
            marks = self.marks[atom].get(role)
            # An expert that the router never chooses adds zero tokens to the running sum that sorts them.
            harmless = role in SUBSET_ROLES or (role == "accumulated" and "routed" in self.marks[atom])
            if marks and not harmless:
                return _explain(text, next(iter(marks.values())))
        return None

    def _subsets(self, atom: Dim) -> tuple[list[SubsetSite], str | None]:
        """Return the modules that must see the kept units alone, and why units can't go if one is no such module."""
        sites: dict[str, SubsetSite] = {}
        for role in SUBSET_ROLES:
            for module, mark in self.marks[atom].get(role, {}).items():
                site = sites.get(module) or self.subsets.find(module, atom)
                softmax_alone = role == "softmax" and "routed" not in self.marks[atom]
                if site is None or softmax_alone:
                    return [], _explain(FREEZING_ROLES[role], mark)
                sites[module] = site
        return list(sites.values()), None

    def _alignment(self, slices: tuple[ParameterSlice, ...]) -> int:
        """Return what grouped products need; a stored model does not say that it was run without them."""
        for part in slices:
            tensor = self.tensors[part.parameter]
            experts = atoms(self.terms[part.parameter, 0])
            if tensor.dim() == 3 and part.dim > 0 and any("routed" in self.marks[atom] for atom in experts):
                return max(1, GROUPED_MM_BYTES // tensor.element_size())
        return 1

    def _kind(self, atom: Dim) -> str:
        if atom in self.inside_heads:
            return "other" if "heads" in self.marks[atom] else "head_dim"
        if "heads" in self.marks[atom]:
            return "heads"
        if "head_dim" in self.marks[atom]:  # of a single head
            return "head_dim"
        if "routed" in self.marks[atom]:
            return "experts"
        if atom in self.hidden:
            return "hidden"
        if self._is_vocabulary(atom):
            return "vocab"
        return "ffn" if self._is_feed_forward(atom) else "other"

    def _atoms_inside_heads(self) -> set[Dim]:
        """Atoms whose units lie within heads: head_dim, or the query heads that share one key head."""
        heads = {atom for atom in self.slices if "heads" in self.marks[atom]}
        extent = {atom: {(s.parameter, s.dim): s.index.numel() for s in self.slices[atom]} for atom in self.slices}
        owners: dict[tuple[str, int], list[Dim]] = defaultdict(list)
        for atom in heads:
            for where in extent[atom]:
                owners[where].append(atom)
        inside = set()
        for atom, mine in extent.items():
            for other in {other for where in mine for other in owners.get(where, ()) if other is not atom}:
                # Key heads lie along queries, keys and values; the repetition of queries along queries alone.
                if atom not in heads or sum(extent[other].values()) > sum(mine.values()):
                    inside.add(atom)
        return inside

    def _is_hidden(self, atom: Dim) -> bool:
        """A residual stream is normalized and is both what layers read and what they write."""
        roles = self.marks[atom]
        if "heads" in roles or "routed" in roles or not {"normalized", "averaged"} & roles.keys():
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
        return any(atom in self.hidden for i in others for atom in atoms(self.terms[part.parameter, i]))


def _explain(text: str, mark: Mark) -> str:
    return text.format(op=mark.op, where=f" in {mark.module}" if mark.module else "")


def common_module(parameters: list[str]) -> str:
    """Return the innermost module that holds all of the parameters, by name."""
    paths = [name.split(".")[:-1] for name in parameters]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
