"""Follow the integers: which module attributes and runtime sizes become sizes of tensors.

Forward code says ``x.view(batch, -1, self.num_heads, self.head_dim)``: when heads go, ``num_heads`` must change with
them. While a forward pass is recorded, integers in module attributes and configs, and those in ``x.shape``, are a
subclass of int that carries the expression it was computed by. Where one reaches an operator as a size, a relation
is written down; after shrinking, the attributes are solved for instead of looked up in a table of architectures.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


@dataclass(frozen=True)
class Attribute:
    """An integer that forward code reads: of a module, or of the config that the module holds."""

    module: str
    """Name of the module."""

    path: tuple[str | int, ...]
    """Attribute names from the module on; an int is a position in a tuple or list."""

    def __str__(self) -> str:
        return ".".join([self.module or "model", *map(str, self.path)])


@dataclass(frozen=True)
class Size:
    """The size of a recorded tensor along one dimension."""

    node: fx.Node
    dim: int


@dataclass(frozen=True)
class Operation:
    """Integer arithmetic."""

    name: str
    left: "Expression"
    right: "Expression"


Expression = int | Attribute | Size | Operation


@dataclass(frozen=True)
class Relation:
    """``expression`` must equal a size of a recorded tensor, before and after shrinking."""

    expression: Expression
    node: fx.Node
    dim: int
    prefix: int | None
    """None: the whole dimension; else the size of what its first ``prefix`` positions become."""

    function: str
    """The Python-level function that took the integer."""

    module: str
    """The module that called it."""


@dataclass(frozen=True)
class NumericUse:
    """``expression`` enters a computation as a number, so it must stay what it is."""

    expression: Expression
    function: str
    module: str


_running: list["IntegerTracer"] = []
"""The tracers that are recording, innermost last: conversions to float are told to them."""


class TracedInt(int):
    """An int that knows how it was computed."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> "TracedInt":
        """Return ``value``, computed by ``expression``."""
        traced = super().__new__(cls, value)
        traced.expression = expression
        return traced

    def __deepcopy__(self, memo: Any) -> "TracedInt":
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __neg__(self) -> int:
        return TracedInt(-int(self), Operation("sub", 0, self.expression))

    def __float__(self) -> float:
        _note_numeric(self, "a conversion to float")
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        _note_numeric(self, "a division")
        _note_numeric(other, "a division")
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        _note_numeric(self, "a division")
        return other / int(self)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        _note_numeric(self, "a power")
        return pow(int(self), other, modulo)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        _note_numeric(self, "a power")
        return pow(other, int(self), modulo)


def _note_numeric(value: Any, function: str) -> None:
    if _running and isinstance(value, TracedInt):
        _running[-1].note_numeric(value, function)


def expression_of(value: int) -> Expression:
    """Return how an int was computed; a plain int is a constant."""
    return value.expression if isinstance(value, TracedInt) else int(value)


def _add_arithmetic(name: str) -> None:
    compute = OPERATORS[name]

    def forward(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return getattr(int, f"__{name}__")(self, other)
        return TracedInt(compute(int(self), int(other)), Operation(name, self.expression, expression_of(other)))

    def backward(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return getattr(int, f"__r{name}__")(self, other)
        return TracedInt(compute(int(other), int(self)), Operation(name, expression_of(other), self.expression))

    setattr(TracedInt, f"__{name}__", forward)
    setattr(TracedInt, f"__r{name}__", backward)


for _name in OPERATORS:
    _add_arithmetic(_name)


@contextmanager
def traced_attributes(model: nn.Module) -> Iterator[None]:
    """Make the integers of every module and of its config traced ones, while the context is open.

    Every module sees a config copy of its own, so that what one module reads is told from what another reads.
    """
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def replace(owner: dict[str, Any], module: str, path: tuple[str | int, ...]) -> None:
        for key, value in list(owner.items()):
            if key.startswith("_") or key == "training":
                continue
            if isinstance(value, PretrainedConfig):
                undo.append((owner, key, value))
                owner[key] = copy.copy(value)
                owner[key].__dict__ = dict(vars(value))
                replace(vars(owner[key]), module, (*path, key))
                continue
            traced = _traced(value, module, (*path, key))
            if traced is not value:
                undo.append((owner, key, value))
                owner[key] = traced

    for name, module in model.named_modules():
        replace(module.__dict__, name, ())
    try:
        yield
    finally:
        for owner, key, value in reversed(undo):
            owner[key] = value


def _traced(value: Any, module: str, path: tuple[str | int, ...]) -> Any:
    if type(value) is int:
        return TracedInt(value, Attribute(module, path))
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(TracedInt(item, Attribute(module, (*path, i))) for i, item in enumerate(value))
    return value


class IntegerTracer(TorchFunctionMode):
    """Writes down the relations, and makes ``x.shape`` and ``x.size()`` give traced integers.

    Args:
        node_of: Returns the recorded node of a tensor, or None.
        current_module: Returns the name of the module that is running.
    """

    def __init__(self, node_of: Callable[[Tensor], fx.Node | None], current_module: Callable[[], str]) -> None:
        super().__init__()
        self.node_of = node_of
        self.current_module = current_module
        self.relations: list[Relation] = []
        self.numeric_uses: list[NumericUse] = []

    def __enter__(self) -> "IntegerTracer":
        _running.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        _running.remove(self)

    def note_numeric(self, value: TracedInt, function: str) -> None:
        """Write down that an integer is computed with."""
        self.numeric_uses.append(NumericUse(value.expression, function, self.current_module()))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _NUMERIC:
            for value in (*args, *kwargs.values()):
                if isinstance(value, TracedInt):
                    self.note_numeric(value, name.strip("_"))
        if name == "size" or (name == "__get__" and getattr(func, "__self__", None) is Tensor.shape):
            return self._traced_size(args, kwargs, result)
        record = _RECORDERS.get(name)
        if record is not None:
            for relation in record(self, args, kwargs, result):
                self.relations.append(relation)
        return result

    def _traced_size(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        node = self.node_of(args[0])
        if node is None:
            return result
        if isinstance(result, int):
            dim = int(args[1] if len(args) > 1 else kwargs["dim"]) % max(args[0].dim(), 1)
            return TracedInt(result, Size(node, dim))
        return torch.Size([TracedInt(size, Size(node, dim)) for dim, size in enumerate(result)])

    def relation(
        self, value: Any, tensor: Any, dim: int, function: str, prefix: int | None = None
    ) -> Iterator[Relation]:
        """Yield the relation between an integer argument and a size of a recorded tensor."""
        node = self.node_of(tensor) if isinstance(tensor, Tensor) else None
        if node is not None and isinstance(value, int) and not isinstance(value, bool):
            yield Relation(expression_of(value), node, dim, prefix, function, self.current_module())


_NUMERIC = {
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "truediv", "pow", "floordiv", "mod")
    for prefix, suffix in (("", ""), ("__", "__"), ("__r", "__"), ("__i", "__"), ("", "_"))
} | {"rsub", "true_divide", "floor_divide", "remainder", "fmod", "tensor", "as_tensor", "masked_fill", "eq", "gt", "lt"}
"""Python-level functions that compute with an integer argument instead of taking it as a size."""


Recorder = Callable[[IntegerTracer, tuple[Any, ...], dict[str, Any], Any], Iterator[Relation]]
_RECORDERS: dict[str, Recorder] = {}


def _recorder(*names: str) -> Callable[[Recorder], Recorder]:
    def add(recorder: Recorder) -> Recorder:
        for name in names:
            _RECORDERS[name] = recorder
        return recorder

    return add


@_recorder(
    "view", "reshape", "expand", "new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty",
    "unflatten", "broadcast_to",
)  # fmt: skip
def _shape(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    """Sizes given one by one or as a tuple; -1 is computed by the operator."""
    given = [a for a in (*args, kwargs.get("size"), kwargs.get("shape")) if a is not None and not isinstance(a, Tensor)]
    flat: list[Any] = []
    for item in given:
        flat.extend(item if isinstance(item, list | tuple) else [item])
    sizes = flat[: result.dim()] if isinstance(result, Tensor) else []
    for dim, size in enumerate(sizes):
        if isinstance(size, int) and size == result.shape[dim]:
            yield from tracer.relation(size, result, dim, "a tensor shape")


@_recorder("split", "split_with_sizes", "tensor_split")
def _split(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    dim = int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    if isinstance(sizes, int):
        yield from tracer.relation(sizes, result[0], dim, "split")
        return
    for size, part in zip(sizes or (), result, strict=False):
        yield from tracer.relation(size, part, dim, "split")


@_recorder("layer_norm", "rms_norm")
def _norm(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    for i, size in enumerate(shape):
        yield from tracer.relation(size, result, result.dim() - len(shape) + i, "a norm")


@_recorder("group_norm")
def _group_norm(
    tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[Relation]:
    """One group for every channel must stay so."""
    groups = args[1] if len(args) > 1 else kwargs["num_groups"]
    if groups == result.shape[1]:
        yield from tracer.relation(groups, result, 1, "a group norm")


@_recorder("conv1d", "conv2d", "conv3d")
def _convolution(
    tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[Relation]:
    """Depthwise: one group for every channel must stay so."""
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if groups > 1 and groups == args[0].shape[1] == result.shape[1]:
        yield from tracer.relation(groups, args[0], 1, "a depthwise convolution")


@_recorder("histc")
def _histc(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    yield from tracer.relation(args[1] if len(args) > 1 else kwargs.get("bins"), result, 0, "histc")


@_recorder("one_hot")
def _one_hot(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    yield from tracer.relation(classes, result, result.dim() - 1, "one_hot")


@_recorder("chunk")
def _chunk(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    """Chunks are equal whatever the size: each must keep its share."""
    count = int(args[1] if len(args) > 1 else kwargs["chunks"])
    dim = int(args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    node = tracer.node_of(args[0])
    for part in result:
        if node is not None:
            share = Operation("floordiv", Operation("add", Size(node, dim), count - 1), count)
            yield from tracer.relation(TracedInt(part.shape[dim], share), part, dim, "chunk")


@_recorder("__getitem__")
def _getitem(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    """x[..., a:b]: both borders must move with what lies before them."""
    tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(item, Tensor | list) for item in index):
        return
    consuming = sum(item is not None and item is not Ellipsis for item in index)
    dim = 0
    for item in index:
        if item is Ellipsis:
            dim += tensor.dim() - consuming
        elif item is not None:
            if isinstance(item, slice):
                yield from _borders(tracer, tensor, dim, item)
            dim += 1


def _borders(tracer: IntegerTracer, tensor: Tensor, dim: int, item: slice) -> Iterator[Relation]:
    size = tensor.shape[dim]
    for border in (item.start, item.stop):
        if not isinstance(border, int) or not -size < border < size or border == 0:
            continue
        if border < 0:
            node = tracer.node_of(tensor)
            if node is None:
                continue
            border = TracedInt(size + int(border), Operation("add", Size(node, dim), expression_of(border)))
        yield from tracer.relation(border, tensor, dim, "a slice", prefix=int(border))


def read(model: nn.Module, attribute: Attribute) -> int:
    """Return the value that an attribute has now."""
    value: Any = model.get_submodule(attribute.module)
    for part in attribute.path:
        value = value[part] if isinstance(part, int) else getattr(value, part)
    return int(value)


def write(model: nn.Module, attribute: Attribute, new: int) -> None:
    """Set an attribute. A config on the way is copied first: other modules may hold the same one."""
    module = model.get_submodule(attribute.module)
    _set(module, attribute.path, new)


def _set(owner: Any, path: tuple[str | int, ...], new: int) -> None:
    name, *rest = path
    assert isinstance(name, str)
    if not rest:
        setattr(owner, name, new)
        return
    value = getattr(owner, name)
    if isinstance(rest[0], int):
        items = list(value)
        items[rest[0]] = new
        setattr(owner, name, type(value)(items))
        return
    own = copy.deepcopy(value)
    _set(own, tuple(rest), new)
    setattr(owner, name, own)
