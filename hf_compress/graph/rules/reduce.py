"""Norms, softmax and reductions: operators that look at all positions of a dimension together."""

from hf_compress.graph.dims import Dim, split_product
from hf_compress.graph.op_rules import OpCall, Operand, Result, op_rule, unify_trailing


@op_rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(op: OpCall) -> Result:
    """Normalize over the trailing dimensions; scale and shift have those dimensions too."""
    x = op.tensor("input")
    normalized = x.dims[len(x.dims) - len(op.arguments["normalized_shape"]) :]
    for dim in normalized:
        op.mark(dim, "normalized")
    for operand in (op.optional("weight"), op.optional("bias")):
        if operand is not None:
            unify_trailing(op, operand, normalized)
    if len(op.shapes) == 1:
        return list(x.dims)
    return (list(x.dims), *(_statistics(x, shape) for shape in op.shapes[1:]))


def _statistics(x: Operand, shape: tuple[int, ...] | None) -> list[Dim] | None:
    if shape is None:
        return None
    if len(shape) != len(x.dims):
        return [Dim(size) for size in shape]
    return [dim if dim.size == size else Dim(size) for dim, size in zip(x.dims, shape, strict=True)]


@op_rule("aten::native_group_norm")
def group_norm(op: OpCall) -> Result:
    """[n, c, ...]: normalize within groups of channels and over space."""
    x = op.tensor("input")
    groups = int(op.arguments["group"])
    outer, inner = split_product(x.dims[1], groups)
    if inner.size > 1:  # else every channel is normalized by itself
        op.mark(outer, "convolution_group")
        op.mark(inner, "normalized")
    for dim in x.dims[2:]:
        op.mark(dim, "spatial")
    for operand in (op.optional("weight"), op.optional("bias")):
        if operand is not None:
            op.unify(operand.dims[0], x.dims[1])
    statistics = [[Dim(size) for size in shape] if shape is not None else None for shape in op.shapes[1:]]
    return (list(x.dims), *statistics)


@op_rule(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::_native_batch_norm_legit",
    "aten::cudnn_batch_norm",
)  # fmt: skip
def batch_norm(op: OpCall) -> Result:
    """Per channel, with stored statistics: nothing mixes."""
    x = op.tensor("input")
    for operand in op.operands()[1:]:
        op.unify(operand.dims[0], x.dims[1])
    rest = [[Dim(size) for size in shape] if shape is not None else None for shape in op.shapes[1:]]
    return (list(x.dims), *rest)


@op_rule("aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax", "aten::softmax", "aten::log_softmax")
def softmax(op: OpCall) -> Result:
    """Softmax over one dimension; a dimension that counts independent attention maps is one of heads."""
    x = op.tensor("self")
    axis = op.axis("dim", len(x.dims))
    op.mark(x.dims[axis], "softmax")
    if axis == len(x.dims) - 1:
        for dim in x.dims[:-2]:
            op.mark(dim, "heads")
    return list(x.dims)


@op_rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp")
def cumulative(op: OpCall) -> Result:
    """Running reductions: a position depends on all those before it."""
    x = op.tensor("self")
    op.mark(x.dims[op.axis("dim", len(x.dims))], "accumulated")
    return list(x.dims)


@op_rule(
    "aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::var", "aten::std", "aten::any", "aten::all",
    "aten::prod", "aten::logsumexp", "aten::norm", "aten::linalg_vector_norm", "aten::max", "aten::min",
    "aten::argmax", "aten::argmin", "aten::var_mean", "aten::median", "aten::count_nonzero",
)  # fmt: skip
def reduction(op: OpCall) -> Result:
    """Reduce one, several or all dimensions."""
    x = op.operands()[0]
    where = op.arguments.get("dim")
    if where is None or where == []:
        axes = set(range(len(x.dims)))
    else:
        listed = [where] if isinstance(where, int) else where
        axes = {int(i) % max(len(x.dims), 1) for i in listed}
    for i in axes:
        if i < len(x.dims):
            op.mark(x.dims[i], "averaged" if op.name == "aten::mean" else "reduced")
    if op.name in ("aten::argmax", "aten::argmin") and len(axes) == 1:
        (axis,) = axes
        op.values = (x.dims[axis],)
    results = [_reduced(x, axes, shape) for shape in op.shapes]
    return results[0] or [] if len(results) == 1 else tuple(results)


def _reduced(x: Operand, axes: set[int], shape: tuple[int, ...] | None) -> list[Dim] | None:
    if shape is None:
        return None
    if len(shape) == len(x.dims):  # keepdim
        return [Dim(1) if i in axes else dim for i, dim in enumerate(x.dims)]
    return [dim for i, dim in enumerate(x.dims) if i not in axes]


@op_rule("aten::topk", "aten::sort", "aten::kthvalue")
def ranking(op: OpCall) -> Result:
    """Order or pick by value; the second result tells positions along the ranked dimension."""
    x = op.tensor("self")
    axis = op.axis("dim", len(x.dims)) if "dim" in op.arguments else len(x.dims) - 1
    kept = Dim((op.shapes[0] or ())[axis])
    op.mark(x.dims[axis], "ranked", kept.size if op.name == "aten::topk" else 1)
    op.values = (x.values, x.dims[axis])
    dims = [kept if i == axis else dim for i, dim in enumerate(x.dims)]
    return tuple(list(dims) for _ in op.shapes)


@op_rule("aten::histc", "aten::bincount")
def histogram(op: OpCall) -> Result:
    """Count how often each number occurs; numbers of units give one count per unit."""
    x, (shape, *_) = op.operands()[0], op.shapes
    if x.values is None or shape != (x.values.size,):
        return op.freeze()
    return [x.values]


@op_rule("aten::nll_loss_forward", "aten::nll_loss2d_forward")
def nll_loss(op: OpCall) -> Result:
    """The class dimension is read by label."""
    x = op.tensor("self")
    for dim in x.dims:
        op.mark(dim, "reduced")
    return tuple([Dim(size) for size in shape] if shape is not None else None for shape in op.shapes)


@op_rule("aten::_weight_norm_interface")
def weight_norm(op: OpCall) -> Result:
    """W = g * v / ||v||: the norm runs over every dimension but one."""
    v, g = op.tensor("v"), op.tensor("g")
    axis = op.axis("dim", len(v.dims))
    for i, dim in enumerate(v.dims):
        if i != axis:
            op.mark(dim, "reduced")
    op.unify(v.dims[axis], g.dims[axis])
    return (list(v.dims), *(_statistics(v, shape) for shape in op.shapes[1:]))
