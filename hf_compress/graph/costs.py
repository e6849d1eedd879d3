"""What a model would cost with fewer units: parameters and operations, computed from the recorded forward pass."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hf_compress.graph.analysis import Analysis
from hf_compress.graph.capture import Capture
from hf_compress.graph.dims import Dim
from hf_compress.graph.groups import DimensionGroup, within
from hf_compress.graph.op_rules import Operand
from hf_compress.graph.solve import new_size

Product = Sequence[Dim]
"""Dimensions whose sizes, multiplied, give a number of multiplications."""


@dataclass(frozen=True)
class _Term:
    """One parameter or one product: as much as its dimensions' sizes, multiplied."""

    owners: tuple[str, ...]
    """Names of the parameter, or of the module that computes the product. It goes when all of them go."""

    dims: Product


class Costs:
    """Parameters and floating-point operations as functions of the numbers of kept units.

    Exact for every group: heads, ffn, hidden, head_dim, experts, other, and layers. Nothing is run.

    Args:
        model: The analyzed model.
        analysis: What was found about its dimensions.
        recorded: The forward pass whose operations are counted.
        atoms: Group name -> its dimension.
        layers: The groups of layers.
    """

    def __init__(
        self,
        model: nn.Module,
        analysis: Analysis,
        recorded: Capture,
        atoms: Mapping[str, Dim],
        layers: Sequence[DimensionGroup] = (),
    ) -> None:
        self._atoms = dict(atoms)
        self.layers = {group.name: group.modules for group in layers}
        """Group name -> names of the layers' modules."""

        self._handed_on = {name for group in layers for name in group.handed_on}
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        self._parameters = [
            _Term(
                tuple(names[id(parameter)]),
                analysis.parameters[name] if name in analysis.parameters else [Dim(size) for size in parameter.shape],
            )
            for name, parameter in model.named_parameters()
        ]
        self._products = _products(recorded, analysis.operands)

    def parameters(self, kept: Mapping[str, int], without: Collection[str] = ()) -> int:
        """Return the number of parameters.

        Args:
            kept: Units that stay, by group name; other groups stay whole.
            without: Names of the modules of layers that go.
        """
        return self._sum(self._parameters, kept, without)

    def flops(self, kept: Mapping[str, int], without: Collection[str] = ()) -> int:
        """Return the floating-point operations of one forward pass on the recorded inputs.

        Matrix products, attention and convolutions count, two operations for each multiplication, as in
        ``torch.utils.flop_counter``.

        Args:
            kept: Units that stay, by group name; other groups stay whole.
            without: Names of the modules of layers that go.
        """
        return 2 * self._sum(self._products, kept, without)

    def _sum(self, terms: Iterable[_Term], kept: Mapping[str, int], without: Collection[str]) -> int:
        sizes = {self._atoms[name]: count for name, count in kept.items() if name in self._atoms}
        staying = (term for term in terms if not without or any(self._stays(name, without) for name in term.owners))
        return sum(math.prod(new_size(dim, sizes) for dim in term.dims) for term in staying)

    def _stays(self, name: str, without: Collection[str]) -> bool:
        """Whether a parameter or module is left; what the first layer hands on (T5's position bias) always is."""
        return within(name, self._handed_on) or not within(name, without)


def _products(recorded: Capture, operands: Mapping[fx.Node, Operand]) -> list[_Term]:
    found: list[_Term] = []
    for node in recorded.graph.nodes:
        if node.op != "call_function":
            continue
        count = _COUNTED.get(getattr(node.target, "_schema", None) and node.target._schema.name)
        if count is not None:
            dims = [operands[arg].dims if isinstance(arg, fx.Node) and arg in operands else [] for arg in node.args]
            result = operands[node].dims if node in operands else []
            found += [_Term((node.meta["module"],), product) for product in count(dims, result)]
    return found


def _matrix(position: int) -> Callable[[list[Any], list[Dim]], list[Product]]:
    """[..., k] @ [..., k, n], the operands starting at ``position`` of the arguments."""
    return lambda args, result: [[*args[position], args[position + 1][-1]]]


def _linear(args: list[list[Dim]], result: list[Dim]) -> list[Product]:
    return [[*args[0], args[1][0]]]


def _vector(args: list[list[Dim]], result: list[Dim]) -> list[Product]:
    return [args[0]]


def _convolution(args: list[list[Dim]], result: list[Dim]) -> list[Product]:
    return [[result[0], *result[2:], *args[1]]]


def _attention(args: list[list[Dim]], result: list[Dim]) -> list[Product]:
    query, key, value = args[:3]
    scores = [*query[:3], key[2]]
    return [[*scores, query[3]], [*scores, value[3]]]


_COUNTED: dict[str | None, Callable[[list[Any], list[Dim]], list[Product]]] = {
    "aten::mm": _matrix(0),
    "aten::bmm": _matrix(0),
    "aten::addmm": _matrix(1),
    "aten::baddbmm": _matrix(1),
    "aten::_grouped_mm": _matrix(0),
    "transformers::grouped_mm_fallback": _matrix(0),
    "aten::linear": _linear,
    "aten::mv": _vector,
    "aten::convolution": _convolution,
    "aten::_convolution": _convolution,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_attention_math": _attention,
    "aten::scaled_dot_product_attention": _attention,
}
