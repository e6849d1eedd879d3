"""Operators that create, move, cut or join data without mixing it; and pointwise operators."""

from collections.abc import Iterator

from hf_compress.graph.dims import ConflictError, Dim, concat, product, split_concat, split_product, take_factors
from hf_compress.graph.op_rules import OpCall, Operand, Result, op_rule, unify_trailing


def broadcast(op: OpCall, operands: list[Operand]) -> list[Dim]:
    """Align operands at the end, unify what is not broadcast and return the result's dimensions."""
    shape = op.shapes[0] or ()
    result: list[Dim] = []
    for position, size in enumerate(shape):
        dim: Dim | None = None
        for operand in operands:
            own = position - (len(shape) - len(operand.dims))
            if own < 0 or (operand.dims[own].size == 1 and size != 1):
                continue
            if dim is None:
                dim = operand.dims[own]
            else:
                op.unify(dim, operand.dims[own])
        result.append(dim if dim is not None else Dim(size))
    return result


def pointwise(op: OpCall) -> Result:
    """Rule of every operator that carries the dispatcher's ``pointwise`` tag."""
    return broadcast(op, op.operands())


@op_rule(
    "aten::clone", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::lift", "aten::_to_copy",
    "aten::contiguous", "aten::to", "aten::_conj", "aten::view_as_real_copy",
)  # fmt: skip
def same(op: OpCall) -> Result:
    """The same values under the same dimensions."""
    x = op.operands()[0]
    op.source = x.source
    return list(x.dims)


@op_rule(
    "aten::dropout", "aten::native_dropout", "aten::zeros_like", "aten::ones_like", "aten::full_like",
    "aten::empty_like", "aten::rand_like", "aten::randn_like", "aten::fill", "aten::zero", "aten::bernoulli",
    "aten::tril", "aten::triu", "aten::exponential", "aten::uniform", "aten::normal",
)  # fmt: skip
def same_shape(op: OpCall) -> Result:
    """New values under the same dimensions."""
    x = op.operands()[0]
    return list(x.dims) if len(op.shapes) == 1 else tuple(list(x.dims) for _ in op.shapes)


@op_rule(
    "aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::scalar_tensor", "aten::new_ones",
    "aten::new_zeros", "aten::new_full", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
    "aten::empty_permuted", "aten::_efficientzerotensor",
)  # fmt: skip
def constant(op: OpCall) -> Result:
    """Every position holds the same value, so a smaller tensor can be made just as well."""
    return [Dim(size) for size in op.shapes[0] or ()]


@op_rule("aten::arange", "aten::eye", "aten::linspace", "aten::randn", "aten::rand", "aten::randint", "aten::randperm")
def indexed(op: OpCall) -> Result:
    """The content depends on the position, so a kept subset cannot be made again at run time."""
    dims = [Dim(size) for size in op.shapes[0] or ()]
    for dim in dims:
        op.mark(dim, "position_dependent")
    return dims


@op_rule("aten::copy")
def copy(op: OpCall) -> Result:
    """self.copy_(src): src broadcasts into self."""
    target = op.tensor("self")
    unify_trailing(op, op.tensor("src"), target.dims)
    return list(target.dims)


@op_rule(
    "aten::view",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::_reshape_copy",
    "aten::view_copy",
    "aten::_reshape_alias",
)
def reshape(op: OpCall) -> Result:
    """Regroup row-major factors. What is cut at odd places is frozen; its neighbors are not."""
    dims, shape = op.tensor("self").dims, op.shapes[0] or ()
    if 0 in shape:  # sizes say nothing then; dimensions that look the same are taken to be the same
        offset = len(dims) - len(shape)
        pairs = [(dims[i + offset] if i + offset >= 0 else Dim(1), size) for i, size in enumerate(shape)]
        return [dim if dim.size == size else Dim(size) for dim, size in pairs]
    result: list[Dim] = []
    for before, after in _blocks([dim.size for dim in dims], shape):
        result += _regroup(op, dims[before], shape[after])
    return result


def _blocks(old: list[int], new: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Yield the smallest runs of old and new sizes that hold equally many elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        left = right = 1
        while (first == i and second == j) or left != right:
            if j == len(new) or (i < len(old) and left <= right):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield slice(first, i), slice(second, j)


def _regroup(op: OpCall, dims: list[Dim], sizes: tuple[int, ...]) -> list[Dim]:
    rest, result = list(dims), []
    try:
        for size in sizes:
            taken, rest = take_factors(rest, size)
            result.append(product(taken))
    except ConflictError:
        result = [Dim(size) for size in sizes]
        for dim in (*dims, *result):
            op.mark(dim, "conflict")
    return result


@op_rule("aten::t")
def transpose_matrix(op: OpCall) -> Result:
    """[a, b] -> [b, a]."""
    return _permuted(op, list(range(len(op.tensor("self").dims)))[::-1])


@op_rule("aten::transpose")
def transpose(op: OpCall) -> Result:
    """Swap two dimensions."""
    order = list(range(len(op.tensor("self").dims)))
    i, j = op.axis("dim0", len(order)), op.axis("dim1", len(order))
    order[i], order[j] = order[j], order[i]
    return _permuted(op, order)


@op_rule("aten::permute")
def permute(op: OpCall) -> Result:
    """Reorder the dimensions."""
    num_dims = len(op.tensor("self").dims)
    return _permuted(op, [int(i) % num_dims for i in op.arguments["dims"]])


def _permuted(op: OpCall, order: list[int]) -> list[Dim]:
    x = op.tensor("self")
    if x.source is not None:
        op.source = (x.source[0], tuple(x.source[1][i] for i in order))
    return [x.dims[i] for i in order]


@op_rule("aten::unsqueeze")
def unsqueeze(op: OpCall) -> Result:
    """Insert a dimension of size 1."""
    x = op.tensor("self")
    dims, at = list(x.dims), op.axis("dim", len(x.dims) + 1)
    dims.insert(at, Dim(1))
    if x.source is not None:
        op.source = (x.source[0], (*x.source[1][:at], None, *x.source[1][at:]))
    return dims


@op_rule("aten::squeeze")
def squeeze(op: OpCall) -> Result:
    """Drop dimensions of size 1: all, one, or those listed."""
    dims = op.tensor("self").dims
    where = op.arguments.get("dim")
    listed = range(len(dims)) if where is None else [where] if isinstance(where, int) else where
    dropped = {int(i) % max(len(dims), 1) for i in listed}
    return [dim for i, dim in enumerate(dims) if not (i in dropped and dim.size == 1)]


@op_rule("aten::as_strided")
def as_strided(op: OpCall) -> Result:
    """Only the form that adds or drops dimensions of size 1 is understood."""
    dims = [dim for dim in op.tensor("self").dims if dim.size != 1]
    shape = op.shapes[0] or ()
    if [dim.size for dim in dims] != [size for size in shape if size != 1]:
        return op.freeze()
    rest = iter(dims)
    return [Dim(1) if size == 1 else next(rest) for size in shape]


@op_rule("aten::expand", "aten::broadcast_to")
def expand(op: OpCall) -> Result:
    """Broadcast to a larger shape."""
    x, shape = op.tensor("self"), op.shapes[0] or ()
    if x.source is not None:
        new = len(shape) - len(x.dims)
        kept = [
            own if dim.size == size else None for dim, own, size in zip(x.dims, x.source[1], shape[new:], strict=True)
        ]
        op.source = (x.source[0], (*[None] * new, *kept))
    return broadcast(op, [x])


@op_rule("aten::repeat")
def repeat(op: OpCall) -> Result:
    """Tile: the whole dimension, several times."""
    dims, times = op.tensor("self").dims, op.arguments["repeats"]
    dims = [Dim(1)] * (len(times) - len(dims)) + dims
    return [dim if n == 1 else product([Dim(n), dim]) for n, dim in zip(times, dims, strict=True)]


@op_rule("aten::repeat_interleave")
def repeat_interleave(op: OpCall) -> Result:
    """Repeat each unit, in place."""
    x, times = op.arguments.get("self"), op.arguments.get("repeats")
    if not isinstance(x, Operand) or not isinstance(times, int) or op.arguments.get("dim") is None:
        return op.freeze()
    dims = list(x.dims)
    axis = op.axis("dim", len(dims))
    dims[axis] = product([dims[axis], Dim(times)])
    return dims


@op_rule("aten::slice")
def slice_(op: OpCall) -> Result:
    """A range along one dimension; a step that divides the size picks one factor."""
    x = op.tensor("self")
    dims, axis = list(x.dims), op.axis("dim", len(x.dims))
    _keep_source(op, x, axis)
    size, kept = dims[axis].size, (op.shapes[0] or ())[axis]
    start, _, step = slice(op.arguments["start"], op.arguments["end"], op.arguments["step"]).indices(size)
    if kept == size:
        return dims
    if kept == 0:
        dims[axis] = Dim(0)
    elif step == 1:
        dims[axis] = _cut_out(op, dims[axis], start, kept)
    elif step > 1 and size % step == 0 and start < step and kept == size // step:
        dims[axis], inner = split_product(dims[axis], kept)
        op.mark(inner, "selected")
    else:
        op.mark(dims[axis], "selected")
        dims[axis] = Dim(kept)
        op.mark(dims[axis], "opaque")
    return dims


def _keep_source(op: OpCall, x: Operand, axis: int) -> None:
    """A part of a parameter along one dimension has the parameter's other dimensions."""
    if x.source is not None:
        op.source = (x.source[0], tuple(None if i == axis else own for i, own in enumerate(x.source[1])))


def _cut_out(op: OpCall, dim: Dim, start: int, kept: int) -> Dim:
    sizes = [start, kept, dim.size - start - kept]
    try:
        return split_concat(dim, [n for n in sizes if n > 0])[1 if start > 0 else 0]
    except ConflictError:
        cut = Dim(kept)
        op.mark(dim, "conflict")
        op.mark(cut, "conflict")
        return cut


@op_rule("aten::select")
def select(op: OpCall) -> Result:
    """One position along a dimension."""
    dims = list(op.tensor("self").dims)
    op.mark(dims.pop(op.axis("dim", len(dims))), "selected")
    return dims


@op_rule("aten::unbind")
def unbind(op: OpCall) -> Result:
    """Every position along a dimension, one result each."""
    dims = list(op.tensor("self").dims)
    op.mark(dims.pop(op.axis("dim", len(dims))), "selected")
    return tuple(list(dims) for _ in op.shapes)


@op_rule(
    "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unsafe_split", "aten::unsafe_chunk",
    "aten::unsafe_split_with_sizes", "aten::tensor_split",
)  # fmt: skip
def split(op: OpCall) -> Result:
    """Cut one dimension into consecutive parts."""
    x = op.tensor("self")
    dims, axis = x.dims, op.axis("dim", len(x.dims))
    _keep_source(op, x, axis)
    parts = split_concat(dims[axis], [shape[axis] for shape in op.shapes if shape is not None])
    return tuple([*dims[:axis], part, *dims[axis + 1 :]] for part in parts)


@op_rule("aten::cat")
def cat(op: OpCall) -> Result:
    """Join along one dimension."""
    operands = [x for x in op.arguments["tensors"] if x.shape != (0,)]
    axis = op.axis("dim", len(op.shapes[0] or ()))
    first, *others = operands
    for other in others:
        for i, dim in enumerate(other.dims):
            if i != axis:
                op.unify(first.dims[i], dim)
    joined = concat([x.dims[axis] for x in operands if x.dims[axis].size > 0])
    return [joined if i == axis else dim for i, dim in enumerate(first.dims)]


@op_rule("aten::stack")
def stack(op: OpCall) -> Result:
    """Join along a new dimension."""
    first, *others = op.arguments["tensors"]
    for other in others:
        for a, b in zip(first.dims, other.dims, strict=True):
            op.unify(a, b)
    dims, new = list(first.dims), Dim(len(others) + 1)
    op.mark(new, "selected")
    dims.insert(op.axis("dim", len(dims) + 1), new)
    return dims


@op_rule("aten::constant_pad_nd")
def pad(op: OpCall) -> Result:
    """Add positions on both sides of trailing dimensions."""
    dims, widths = list(op.tensor("self").dims), op.arguments["pad"]
    if any(width < 0 for width in widths):
        return op.freeze()
    for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        axis = len(dims) - 1 - i
        dims[axis] = concat([part for part in (Dim(before), dims[axis], Dim(after)) if part.size > 0])
    return dims


@op_rule("aten::glu")
def glu(op: OpCall) -> Result:
    """The first half of a dimension times the sigmoid of the second."""
    dims = list(op.tensor("self").dims)
    axis = op.axis("dim", len(dims))
    value, gate = split_concat(dims[axis], [dims[axis].size // 2] * 2)
    op.unify(value, gate)
    dims[axis] = value
    return dims


@op_rule(
    "aten::hardswish", "aten::hardsigmoid", "aten::rrelu_with_noise", "aten::_prelu_kernel", "aten::masked_scatter"
)
def untagged_pointwise(op: OpCall) -> Result:
    """Pointwise operators that lack the dispatcher's tag; masked_scatter fills where the mask says, row after row."""
    x, *others = op.operands()
    for other in others:
        if other.dims and x.dims and other.dims[-1].size == x.dims[-1].size:
            op.unify(other.dims[-1], x.dims[-1])
    return list(x.dims)


@op_rule("aten::roll", "aten::flip")
def roll(op: OpCall) -> Result:
    """Positions move, so what a position means depends on all of them."""
    dims = list(op.tensor("self").dims)
    for axis in op.arguments["dims"] or range(len(dims)):
        op.mark(dims[axis], "selected")
    return dims
