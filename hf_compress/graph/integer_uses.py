"""Which integer arguments of Python-level functions become sizes of tensors; importing this registers them."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hf_compress.graph.integers import (
    IntegerTracer,
    Operation,
    Recorder,
    Relation,
    Size,
    TracedInt,
    expression_of,
    recorders,
)


def _recorder(*names: str) -> Callable[[Recorder], Recorder]:
    def add(recorder: Recorder) -> Recorder:
        for name in names:
            recorders[name] = recorder
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
        for part in result:
            if part.shape[dim] == sizes:
                yield from tracer.relation(sizes, part, dim, "split")
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


@_recorder("multi_head_attention_forward")
def _attention(tracer: IntegerTracer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Iterator[Relation]:
    """PyTorch's function insists on one size for its input, its projections and its output."""
    query = args[0] if args else kwargs["query"]
    size = args[3] if len(args) > 3 else kwargs.get("embed_dim_to_check")
    yield from tracer.relation(size, query, query.dim() - 1, "multi_head_attention_forward")
    projections = [kwargs.get(f"{name}_proj_weight") for name in ("q", "k", "v")]
    output = args[11] if len(args) > 11 else kwargs.get("out_proj_weight")
    for weight in (*projections, output):
        if isinstance(weight, Tensor):
            for dim in range(2):
                if weight.shape[dim] == size:
                    yield from tracer.relation(size, weight, dim, "multi_head_attention_forward")


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


__all__ = ["recorders"]
