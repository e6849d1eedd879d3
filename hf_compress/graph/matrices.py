"""Which parameters are matrices: those that the forward pass multiplies with activations."""

import math
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from hf_compress.graph.analysis import VALUE_PRESERVING
from hf_compress.graph.capture import Capture

REARRANGING = {
    *VALUE_PRESERVING, "aten::index", "aten::index_select", "aten::unbind", "aten::split", "aten::split_with_sizes",
    "aten::chunk",
}  # fmt: skip
"""Operators whose result holds elements of their first operand, as they are."""

PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::mv", "aten::_grouped_mm",
    "transformers::grouped_mm_fallback", "aten::convolution", "aten::_convolution",
}  # fmt: skip


def matrices(model: nn.Module, recorded: Sequence[Capture]) -> dict[str, int]:
    """Return the number of weights of every parameter of at least two dimensions that enters a product, by name.

    Args:
        model: The model.
        recorded: Its forward pass, in one or several ways.
    """
    parameters = {name for name, _ in model.named_parameters()}
    found = {}
    for each in recorded:
        for name, node in each.parameters.items():
            shape = node.meta["shape"]
            if name in parameters and len(shape) > 1 and _is_multiplied(node):
                found[name] = math.prod(shape)
    return found


def _is_multiplied(source: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    queue = [source]
    while queue:
        node = queue.pop()
        for user in node.users:
            name = _name(user)
            if name in PRODUCTS:
                return True
            rearranges = name in REARRANGING and user.args[0] is node
            if (rearranges or name == "getitem") and user not in seen:
                seen.add(user)
                queue.append(user)
    return False


def _name(node: fx.Node) -> str:
    schema: Any = getattr(node.target, "_schema", None)
    return getattr(node.target, "__name__", "") if schema is None else schema.name
