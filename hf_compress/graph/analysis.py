"""One pass over the recorded graph that gives every tensor dimension its term."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from hf_compress.errors import GraphError
from hf_compress.graph import rules
from hf_compress.graph.capture import Capture
from hf_compress.graph.dims import ConflictError, Dim
from hf_compress.graph.op_rules import Consumer, Mark, OpCall, Operand, Result, Rule
from hf_compress.graph.rules.layout import pointwise
from hf_compress.registry import op_rules

assert rules.__all__  # imported for the rules it registers


VALUE_PRESERVING = {
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::t", "aten::transpose", "aten::permute",
    "aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::slice", "aten::select", "aten::clone", "aten::detach",
    "aten::_to_copy", "aten::alias", "aten::clamp", "aten::clamp_max", "aten::clamp_min", "aten::contiguous",
}  # fmt: skip
"""Operators after which integers that are positions along a dimension still are."""


@dataclass
class Analysis:
    """What the recorded operators say about the dimensions of the model's parameters."""

    parameters: dict[str, list[Dim]]
    """Per parameter or buffer that the forward pass read: one term per dimension."""

    marks: list[Mark]
    """Roles given to dimensions, in program order."""

    consumers: list[Consumer]
    """Parameter dimensions contracted with activations."""

    operands: dict[fx.Node, Operand]
    """Every recorded tensor."""


def analyze(recorded: Sequence[Capture]) -> Analysis:
    """Apply the operators' rules in program order, to one recorded forward pass after the other.

    Several passes (other modes, other inputs) share the parameters, so what one of them ties together stays together.
    """
    parameters: dict[str, Operand] = {}
    marks: list[Mark] = []
    consumers: dict[Consumer, None] = {}
    operands: dict[fx.Node, Operand] = {}
    for each in recorded:
        interpreter = _Interpreter(each, parameters)
        interpreter.run()
        marks += interpreter.marks
        consumers.update(dict.fromkeys(interpreter.consumers))
        operands.update((node, value) for node, value in interpreter.values.items() if isinstance(value, Operand))
    return Analysis({name: value.dims for name, value in parameters.items()}, marks, list(consumers), operands)


class _Interpreter:
    def __init__(self, recorded: Capture, parameters: dict[str, Operand]) -> None:
        self.recorded = recorded
        self.parameters = parameters
        self.live = live_nodes(recorded)
        self.values: dict[fx.Node, Operand | list[Operand | None]] = {}
        self.marks: list[Mark] = []
        self.consumers: list[Consumer] = []

    def run(self) -> None:
        for node in self.recorded.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.values[node] = self._source(node)
            elif node.op == "call_function" and node.target is operator.getitem:
                self.values[node] = self._item(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
        for node in self.recorded.outputs:
            self._mark_all(self._operand(node), "output", "the model's output", node.meta["module"])

    def _source(self, node: fx.Node) -> Operand:
        name = str(node.target)
        if name in self.parameters:
            return self.parameters[name]
        operand = Operand([Dim(size) for size in node.meta["shape"]])
        if node.op == "placeholder":
            self._mark_all(operand, "input", f"input {node.name}", "")
        elif name in self.recorded.parameters:
            operand.source = (name, tuple(range(len(operand.dims))))
            self.parameters[name] = operand
        else:
            self._mark_all(operand, "constant", "a tensor that is neither parameter nor buffer", node.meta["module"])
        return operand

    def _mark_all(self, operand: Operand, role: str, op: str, module: str) -> None:
        self.marks += [Mark(dim, role, op, module) for dim in operand.dims]

    def _item(self, node: fx.Node) -> Operand:
        value = self.values[node.args[0]]  # type: ignore[index]
        item = value[node.args[1]] if isinstance(value, list) else value  # type: ignore[index]
        return item if item is not None else Operand([Dim(size) for size in node.meta["shape"]])

    def _operand(self, node: fx.Node) -> Operand:
        value = self.values[node]
        assert isinstance(value, Operand), node
        return value

    def _call(self, node: fx.Node) -> Operand | list[Operand | None]:
        several = isinstance(node.meta["shape"], list)
        call = OpCall(
            name=_qualified_name(node.target),
            module=node.meta["module"],
            arguments=self._arguments(node),
            shapes=node.meta["shape"] if several else [node.meta["shape"]],
            live=node in self.live,
        )
        result = self._apply(node, call)
        self.marks += call.marks
        self.consumers += call.consumers if call.live else []
        values = call.values
        if not values and call.name in VALUE_PRESERVING:
            values = (call.operands()[0].values,)
        if several:
            return [
                None if dims is None else Operand(dims, call.source, domain)  # type: ignore[arg-type]
                for dims, domain in zip_longest(result, values)
            ]
        source = call.source
        if source is None and node.target._schema.is_mutable and call.operands():  # type: ignore[union-attr]
            source = call.operands()[0].source  # a parameter that is changed in place still is that parameter
        return Operand(result, source, *values)  # type: ignore[arg-type]

    def _apply(self, node: fx.Node, call: OpCall) -> Result:
        rule = _rule_for(call.name, node.target)
        try:
            result = call.freeze("no_rule") if rule is None else rule(call)
        except ConflictError:
            result = call.freeze("conflict")
        except GraphError:
            raise
        except Exception as error:
            raise GraphError(
                f"the op rule of {call.name} failed{f' in {call.module!r}' if call.module else ''}: "
                f"{type(error).__name__}: {error}. Rules get an OpCall and return the dimensions of the result."
            ) from error
        if not _fits(result, call.shapes):
            # A rule that does not know its operator must never lead to a wrong slice.
            call.marks.clear()
            return call.freeze("wrong_rule")
        return result

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        schema: Any = node.target._schema  # type: ignore[union-attr]
        arguments: dict[str, Any] = {}
        for position, argument in enumerate(schema.arguments):
            if position < len(node.args):
                value: Any = node.args[position]
            else:
                value = node.kwargs.get(argument.name, argument.default_value)
            arguments[argument.name] = self._value(value)
        return arguments

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._operand(value)
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        return value


def _fits(result: Any, shapes: Sequence[tuple[int, ...] | None]) -> bool:
    """Whether a rule returned one dimension of the right size for each of the results' own."""
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != len(shapes):
        return False
    for dims, shape in zip(results, shapes, strict=True):
        if dims is not None and not (isinstance(dims, list | tuple) and all(isinstance(dim, Dim) for dim in dims)):
            return False
        if (None if dims is None else tuple(dim.size for dim in dims)) != shape:
            return False
    return True


def _qualified_name(target: Any) -> str:
    namespace, _, name = target._schema.name.partition("::")
    if name.endswith("_") and f"{namespace}::{name}" not in op_rules:
        name = name.removesuffix("_")
    return f"{namespace}::{name}"


def _rule_for(name: str, target: Any) -> Rule | None:
    if name in op_rules:
        rule: Rule = op_rules.get(name)
        return rule
    return pointwise if torch.Tag.pointwise in target.tags else None


def live_nodes(recorded: Capture) -> set[fx.Node]:
    """Return the nodes on which the output depends; a write to a live storage is live."""
    live: set[fx.Node] = set(recorded.outputs)
    storages = {node.meta["storage"] for node in live}
    for node in reversed(recorded.graph.nodes):
        if node.op != "call_function":
            continue
        mutates = node.target is not operator.getitem and node.target._schema.is_mutable
        if mutates and any(arg.meta.get("storage") in storages for arg in node.all_input_nodes):
            live.add(node)
        if node in live:
            live.update(node.all_input_nodes)
            storages.update(arg.meta["storage"] for arg in node.all_input_nodes if "storage" in arg.meta)
    return live
