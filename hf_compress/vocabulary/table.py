"""Find a model's vocabulary: which parameters and buffers hold one row for each token, and how forward uses ids.

Two sources must agree. The architecture, built without memory from its config with one more row, says which
dimensions grow with the vocabulary; the recorded forward pass says that these are whole dimensions, that nothing else
goes with them, and that token ids do nothing but look up rows and get compared.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.dims import atoms, find
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.model import ModelGraph
from hf_compress.graph.roles import FREEZING_ROLES

HARMLESS_ROLES = ("indexed", "output")
"""What may happen to the vocabulary dimension: rows are looked up by id, and logits come out along it."""

NUMBER_AT = {"constant_pad_nd": 2, "eq": 1, "fill": 1, "fill_": 1, "masked_fill": 2, "masked_fill_": 2, "ne": 1}
"""Operators that compare token ids with a number or write it among them, with the place of the number."""

COMPARISONS = ("eq", "ne")

LAYOUT = frozenset(
    {"_to_copy", "_unsafe_view", "alias", "cat", "clone", "constant_pad_nd", "contiguous", "copy", "copy_", "detach"}
    | {"expand", "fill", "fill_", "flip", "gather", "getitem", "index", "index_select", "lift_fresh", "masked_fill"}
    | {"masked_fill_", "permute", "repeat"}
    | {"reshape", "roll", "select", "slice", "split", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze"}
    | {"view", "where"}
)
"""Operators that move token ids around and leave them what they are."""

INDEXING = ("gather", "index", "index_select")

SHAPE_ONLY = frozenset(
    {"empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "sym_size", "zeros_like"}
)
"""Operators that read nothing but the shape."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a model."""

    table: str
    """The embedding that is looked up with token ids."""

    rows: int
    """How many rows it has."""

    dims: tuple[tuple[str, int], ...]
    """Parameters and buffers with the dimension along which the rows lie; shared ones under one name."""

    numbers: tuple[tuple[int, str], ...]
    """Numbers that forward code compares token ids with or writes among them, and the module where."""


def find_vocabulary(model: PreTrainedModel, example_inputs: Mapping[str, Any] | None = None) -> Vocabulary:
    """Find the rows that belong to tokens.

    Args:
        model: The model; its forward pass is recorded.
        example_inputs: Keyword arguments for the forward pass; made from the config by default.

    Raises:
        ShrinkError: If there is no vocabulary, more than one, or one that is used in a way that is not understood.
        GraphError: If the forward pass cannot be recorded.
    """
    _check_described(model)
    graph = ModelGraph(model, example_inputs)
    table, numbers = _Ids(model, graph).follow()
    rows = _tensors(model)[table].shape[0]
    config = copy.deepcopy(model.config)
    text_config(config).vocab_size = rows + 1
    grown = _shapes(twin(model, config))
    dims = _grown_dims(model, grown, rows)
    _check_groups(graph, table, dims, rows)
    return Vocabulary(table, rows, tuple(sorted(dims)), numbers)


def _check_described(model: PreTrainedModel) -> None:
    """Refuse models that are not what their class makes of their config.

    Raises:
        ShrinkError: If a parameter or buffer is missing, of another shape or one too many.
    """
    expected, actual = _shapes(twin(model, model.config)), _shapes(model)
    odd = [name for name in {**actual, **expected} if actual.get(name) != expected.get(name)]
    if odd:
        raise ShrinkError(
            f"prune_vocabulary: the {type(model).__name__} is not what its config describes (differs in: "
            f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}). Merge and unload adapters first, change the "
            "number of tokens with model.resize_token_embeddings only, and prune the vocabulary before anything that "
            "makes layers uneven."
        )


def text_config(config: PretrainedConfig) -> Any:
    """Return the config that holds ``vocab_size``."""
    return config.get_text_config()


def twin(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model's architecture from ``config`` on the meta device, without memory.

    Raises:
        ShrinkError: If the architecture refuses the config.
    """
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(config))
    except Exception as error:
        raise ShrinkError(
            f"prune_vocabulary: {type(model).__name__} cannot be built from its config with vocab_size "
            f"{getattr(text_config(config), 'vocab_size', None)} ({type(error).__name__}: {error})."
        ) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}


def _grown_dims(model: PreTrainedModel, grown: dict[str, tuple[int, ...]], rows: int) -> set[tuple[str, int]]:
    first_name: dict[int, str] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        first_name[id(tensor)] = name
    dims = set()
    for name, tensor in _tensors(model).items():
        for dim, (old, new) in enumerate(zip(tensor.shape, grown.get(name, ()), strict=True)):
            if old != new:
                if (old, new) != (rows, rows + 1):
                    raise _refusal(model, f"the size of {name} follows config.vocab_size in a way of its own")
                dims.add((first_name[id(tensor)], dim))
    return dims


def _check_groups(graph: ModelGraph, table: str, dims: set[tuple[str, int]], rows: int) -> None:
    """Check that the recorded forward pass agrees on what belongs to the vocabulary."""
    model = graph.model
    if (table, 0) not in dims:
        raise _refusal(model, f"the size of {table} does not follow config.vocab_size")
    # The architecture alone speaks for what is not read, such as the second bias of an untied BERT.
    unread = {part for part in dims if part[0] not in graph.analysis.parameters}
    found: set[tuple[str, int]] = set()
    for group in graph.groups:
        parts = {(part.parameter, part.dim) for part in (*group.slices, *group.buffers)}
        if parts & dims:
            found |= parts
            _check_group(graph, group, rows)
    for name, dim in (dims ^ found) - unread:
        what = "goes together with it" if (name, dim) in found else "belongs to no group of dimensions"
        raise _refusal(model, f"dimension {dim} of {name} {what}")


def _check_group(graph: ModelGraph, group: DimensionGroup, rows: int) -> None:
    for part in (*group.slices, *group.buffers):
        if part.index.shape != (rows, 1) or not torch.equal(part.index[:, 0], torch.arange(rows)):
            raise _refusal(graph.model, f"a token owns more than one row of {part.parameter}")
    part = next(iter((*group.slices, *group.buffers)))
    atom = find(graph.analysis.parameters[part.parameter][part.dim])
    for mark in graph.analysis.marks:
        harmful = mark.role in FREEZING_ROLES and mark.role not in HARMLESS_ROLES
        if harmful and any(find(other) is atom for other in atoms(mark.dim)):
            where = f" in {mark.module}" if mark.module else ""
            raise _refusal(graph.model, FREEZING_ROLES[mark.role].format(op=mark.op, where=where))


def _refusal(model: nn.Module, reason: str) -> ShrinkError:
    return ShrinkError(f"prune_vocabulary: the vocabulary of {type(model).__name__} cannot lose rows: {reason}.")


class _Ids:
    """Follows token ids through the recorded forward pass."""

    def __init__(self, model: PreTrainedModel, graph: ModelGraph) -> None:
        self.model = model
        passes = dict.fromkeys(node.graph for node in graph.analysis.operands)
        self.nodes = [node for each in passes for node in each.nodes]
        self.holding: set[fx.Node] = set()
        self.bases: dict[fx.Node, fx.Node] = {}
        self.tables: dict[str, None] = {}
        self.numbers: dict[tuple[int, str], None] = {}

    def follow(self) -> tuple[str, tuple[tuple[int, str], ...]]:
        """Return the table that ids look up, and the numbers that are used as ids."""
        for node in self.nodes:
            self.bases[node] = self._base(node)
            if node.op == "placeholder" and node.name.endswith("input_ids"):
                self._hold(node)
            elif node.op == "call_function":
                self._call(node)
        if not self.tables:
            raise ShrinkError(
                f"prune_vocabulary: the forward pass of {type(self.model).__name__} looks no token ids up in an "
                "embedding, so it has no vocabulary to prune."
            )
        if len(self.tables) > 1:
            raise _refusal(self.model, f"it has several vocabularies: {', '.join(self.tables)}")
        return next(iter(self.tables)), tuple(self.numbers)

    def _base(self, node: fx.Node) -> fx.Node:
        """Return the tensor that a view looks into, or the node itself."""
        inputs = node.all_input_nodes
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(each.alias_info is not None for each in schema.returns)
        return self.bases[inputs[0]] if inputs and views else node

    def _hold(self, node: fx.Node) -> None:
        """Ids that are written into a view are in the tensor itself, and in all views of it."""
        self.holding.add(self.bases[node])

    def _holds(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self.bases[node] in self.holding

    def _call(self, node: fx.Node) -> None:
        if not any(self._holds(argument) for argument in node.all_input_nodes):
            return
        name = _name(node)
        module = str(node.meta.get("module", ""))
        if name == "embedding":
            self._look_up(node)
            return
        if name in NUMBER_AT:
            self.numbers[self._number(node, name, module), module] = None
        if name in LAYOUT and not (name in INDEXING and self._holds_indices(node)):
            self._hold(node)
            if name.endswith("_") and isinstance(node.args[0], fx.Node):
                self._hold(node.args[0])
        elif name not in SHAPE_ONLY and name not in COMPARISONS:
            raise _refusal(self.model, f"{name} in {module or 'its forward'} computes with token ids")

    def _holds_indices(self, node: fx.Node) -> bool:
        """Whether ids are what is indexed with, not what is indexed."""
        return any(self._holds(argument) for argument in node.all_input_nodes if argument is not node.args[0])

    def _look_up(self, node: fx.Node) -> None:
        weight = node.args[0]
        while isinstance(weight, fx.Node) and weight.op == "call_function" and _name(weight) in LAYOUT:
            weight = weight.args[0]  # a cast, say
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise _refusal(self.model, f"{node.meta.get('module')} looks token ids up in a table that is computed")
        self.tables[str(weight.target)] = None

    def _number(self, node: fx.Node, name: str, module: str) -> int:
        place = NUMBER_AT[name]
        number = node.args[place] if len(node.args) > place else 0
        if not isinstance(number, int | float) or not float(number).is_integer():
            raise _refusal(self.model, f"{name} in {module or 'its forward'} brings token ids and a tensor together")
        return int(number)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).partition("::")[2] if schema is not None else "getitem"
