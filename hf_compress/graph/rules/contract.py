"""Matrix products, attention and convolutions."""

from hf_compress.graph.dims import Dim, split_product
from hf_compress.graph.op_rules import OpCall, Operand, Result, op_rule, unify_trailing


@op_rule("aten::mm")
def mm(op: OpCall) -> Result:
    """[m, k] @ [k, n] -> [m, n]."""
    a, b = op.tensor("self"), op.tensor("mat2")
    op.contract(a, 1, b, 0)
    return [a.dims[0], b.dims[1]]


@op_rule("aten::addmm")
def addmm(op: OpCall) -> Result:
    """Bias + [m, k] @ [k, n] -> [m, n]."""
    a, b = op.tensor("mat1"), op.tensor("mat2")
    op.contract(a, 1, b, 0)
    dims = [a.dims[0], b.dims[1]]
    unify_trailing(op, op.tensor("self"), dims)
    return dims


@op_rule("aten::linear")
def linear(op: OpCall) -> Result:
    """[..., k] @ [n, k]^T + bias -> [..., n]."""
    x, weight, bias = op.tensor("input"), op.tensor("weight"), op.optional("bias")
    op.contract(x, -1, weight, 1)
    if bias is not None:
        op.unify(bias.dims[0], weight.dims[0])
    return [*x.dims[:-1], weight.dims[0]]


@op_rule("aten::bmm")
def bmm(op: OpCall) -> Result:
    """[b, m, k] @ [b, k, n] -> [b, m, n]."""
    return _batched(op, op.tensor("self"), op.tensor("mat2"))


@op_rule("aten::baddbmm")
def baddbmm(op: OpCall) -> Result:
    """Bias + [b, m, k] @ [b, k, n] -> [b, m, n]."""
    dims = _batched(op, op.tensor("batch1"), op.tensor("batch2"))
    unify_trailing(op, op.tensor("self"), dims)
    return dims


def _batched(op: OpCall, a: Operand, b: Operand) -> list[Dim]:
    op.unify(a.dims[0], b.dims[0])
    op.contract(a, 2, b, 1)
    return [a.dims[0], a.dims[1], b.dims[2]]


@op_rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped(op: OpCall) -> Result:
    """Rows [t, k], sorted by expert, @ [e, k, n] -> [t, n]; offs [e] says where each expert's rows end."""
    x, weight, offsets = (op.operands() + [None] * 3)[:3]
    if x is None or weight is None or offsets is None or len(x.dims) != 2 or len(weight.dims) != 3:
        return op.freeze()
    op.contract(x, 1, weight, 1)
    op.unify(weight.dims[0], offsets.dims[0])
    op.mark(weight.dims[0], "routed")
    return [x.dims[0], weight.dims[2]]


@op_rule("aten::mv")
def mv(op: OpCall) -> Result:
    """[m, k] @ [k] -> [m]."""
    a, b = op.tensor("self"), op.tensor("vec")
    op.contract(a, 1, b, 0)
    return [a.dims[0]]


@op_rule("aten::dot")
def dot(op: OpCall) -> Result:
    """[k] . [k] -> []."""
    op.contract(op.tensor("self"), 0, op.tensor("tensor"), 0)
    return []


@op_rule("aten::outer", "aten::ger")
def outer(op: OpCall) -> Result:
    """[m] x [n] -> [m, n]."""
    return [op.tensor("self").dims[0], op.tensor("vec2").dims[0]]


@op_rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps", "aten::scaled_dot_product_attention",
)  # fmt: skip
def attention(op: OpCall) -> Result:
    """Scaled dot-product attention on [batch, heads, length, head_dim]; key and value may have fewer heads."""
    query, key, value = (op.tensor(name).dims for name in ("query", "key", "value"))
    for a, b in ((query[0], key[0]), (query[0], value[0]), (key[1], value[1]), (key[2], value[2]), (query[3], key[3])):
        op.unify(a, b)
    op.mark(query[3], "contracted_activations")
    if op.arguments.get("scale") is None:
        op.mark(query[3], "numeric")  # the kernel scales by the size itself
    op.mark(key[2], "softmax")
    op.mark(query[1], "heads")
    if query[1].size == key[1].size:
        op.unify(query[1], key[1])
    else:
        shared, _ = split_product(query[1], key[1].size)
        op.unify(shared, key[1])
    mask = op.optional("attn_mask") or op.optional("attn_bias")
    if mask is not None:
        unify_trailing(op, mask, [query[0], query[1], query[2], key[2]])
    result = [query[0], query[1], query[2], value[3]]
    return (result, *_by_size(op, query[:3])) if len(op.shapes) > 1 else result


def _by_size(op: OpCall, dims: list[Dim]) -> list[list[Dim] | None]:
    """Name the dimensions of the log-sum-exp and its like; the rest of an attention kernel's results are private."""
    named: list[list[Dim] | None] = []
    for shape in op.shapes[1:]:
        if shape is None:
            named.append(None)
        else:
            matches = shape == tuple(dim.size for dim in dims)
            named.append(list(dims) if matches else [Dim(size) for size in shape])
    return named


@op_rule("aten::convolution", "aten::_convolution")
def convolution(op: OpCall) -> Result:
    """[b, c_in, ...] * [c_out, c_in / groups, ...] -> [b, c_out, ...]."""
    x, weight, bias = op.tensor("input"), op.tensor("weight"), op.optional("bias")
    if op.arguments["transposed"]:
        return op.freeze()
    groups = int(op.arguments["groups"])
    if groups == 1:
        op.contract(x, 1, weight, 1)
    else:
        _grouped(op, x, weight, groups)
    if bias is not None:
        op.unify(bias.dims[0], weight.dims[0])
    for dim in weight.dims[2:]:
        op.mark(dim, "kernel")
    spatial = [Dim(size) for size in (op.shapes[0] or ())[2:]]
    for dim in [*x.dims[2:], *spatial]:
        op.mark(dim, "spatial")
    return [x.dims[0], weight.dims[0], *spatial]


def _grouped(op: OpCall, x: Operand, weight: Operand, groups: int) -> None:
    group_in, inner = split_product(x.dims[1], groups)
    group_out, repeated = split_product(weight.dims[0], groups)
    op.unify(group_in, group_out)
    if inner.size == 1 and repeated.size == 1:  # depthwise: a channel goes with its own filter
        return
    op.mark(group_in, "convolution_group")
    op.unify(inner, weight.dims[1])
    op.mark(inner, "convolution_group")
