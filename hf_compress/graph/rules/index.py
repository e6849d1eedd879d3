"""Operators that read or write by integer index."""

from hf_compress.graph.dims import Dim
from hf_compress.graph.op_rules import OpCall, Operand, Result, op_rule, unify_trailing
from hf_compress.graph.rules.layout import broadcast


def _look_up(op: OpCall, dim: Dim, indices: Operand) -> None:
    """Say that positions along a dimension are picked by number.

    If the numbers are positions along another dimension (a router ranks its logits, tokens pick their experts), the two
    are the same units, and removing one renumbers both.
    """
    if indices.values is not None and indices.values.size == dim.size:
        op.unify(indices.values, dim)
        op.mark(dim, "routed")
    else:
        op.mark(dim, "indexed")


@op_rule("aten::embedding")
def embedding(op: OpCall) -> Result:
    """Rows of a table."""
    weight, indices = op.tensor("weight"), op.tensor("indices")
    _look_up(op, weight.dims[0], indices)
    return [*indices.dims, weight.dims[1]]


@op_rule("aten::index")
def index(op: OpCall) -> Result:
    """x[i, :, j]: indexed dimensions give way to the broadcast shape of the indices."""
    x = op.tensor("self")
    used = {i: item for i, item in enumerate(op.arguments["indices"]) if isinstance(item, Operand)}
    shape = op.shapes[0] or ()
    rest = [dim for i, dim in enumerate(x.dims) if i not in used]
    num_new = len(shape) - len(rest)
    if num_new != max((len(item.dims) for item in used.values()), default=0):
        return _where_true(op, x, used)
    for i, item in used.items():
        _look_up(op, x.dims[i], item)
    places = sorted(used)
    together = places == list(range(places[0], places[-1] + 1))
    at = places[0] if together else 0
    picked: list[Dim] = []
    for position in range(num_new):
        dim = Dim(shape[at + position])
        for item in used.values():
            own = position - (num_new - len(item.dims))
            if own >= 0 and item.dims[own].size == dim.size:
                op.unify(dim, item.dims[own])
        picked.append(dim)
    if x.source is not None and used.keys() == {0}:  # picking rows of a parameter leaves its other dimensions
        op.source = (x.source[0], (*[None] * num_new, *x.source[1][1:]))
    op.values = (x.values,)
    return rest[:at] + picked + rest[at:]


def _where_true(op: OpCall, x: Operand, used: dict[int, Operand]) -> Result:
    """x[mask]: the dimensions of one boolean mask become one."""
    (at, mask), *others = used.items()
    shape, end = op.shapes[0] or (), at + len(mask.dims)
    if others or mask.shape != x.shape[at:end] or len(shape) != len(x.dims) - len(mask.dims) + 1:
        return op.freeze()
    for own, other in zip(x.dims[at:end], mask.dims, strict=True):
        op.unify(own, other)
        op.mark(own, "selected")
    return [*x.dims[:at], Dim(shape[at]), *x.dims[end:]]


@op_rule("aten::nonzero", "aten::unique_consecutive", "aten::_unique2", "aten::unique_dim")
def data_dependent(op: OpCall) -> Result:
    """Which positions are meant depends on the data."""
    for dim in op.operands()[0].dims:
        op.mark(dim, "selected")
    results = [[Dim(size) for size in shape] if shape is not None else None for shape in op.shapes]
    return results[0] or [] if len(results) == 1 else tuple(results)


@op_rule("aten::index_select")
def index_select(op: OpCall) -> Result:
    """Pick positions along one dimension."""
    dims = list(op.tensor("self").dims)
    axis = op.axis("dim", len(dims))
    _look_up(op, dims[axis], op.tensor("index"))
    dims[axis] = op.tensor("index").dims[0] if op.tensor("index").dims else Dim(1)
    return dims


@op_rule("aten::gather")
def gather(op: OpCall) -> Result:
    """Pick one position per entry along one dimension."""
    x, where = op.tensor("self"), op.tensor("index")
    _along(op, x, where)
    return list(where.dims)


@op_rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(op: OpCall) -> Result:
    """Write one position per entry along one dimension."""
    x, where, source = op.tensor("self"), op.tensor("index"), op.optional("src")
    _along(op, x, where)
    if source is not None and source.shape == where.shape:
        for a, b in zip(source.dims, where.dims, strict=True):
            op.unify(a, b)
    return list(x.dims)


def _along(op: OpCall, x: Operand, where: Operand) -> None:
    """Indices name positions along one dimension and lie at the same position along all others."""
    axis = op.axis("dim", len(x.dims))
    if not x.dims:
        return
    _look_up(op, x.dims[axis], where)
    for i, (a, b) in enumerate(zip(x.dims, where.dims, strict=True)):
        if i != axis and a.size == b.size:
            op.unify(a, b)


@op_rule("aten::index_put")
def index_put(op: OpCall) -> Result:
    """x[indices] = values."""
    x, indices = op.tensor("self"), op.arguments["indices"]
    for i, item in enumerate(indices):
        if isinstance(item, Operand):
            _look_up(op, x.dims[i], item)
    unify_trailing(op, op.tensor("values"), x.dims[len(indices) :])
    return list(x.dims)


@op_rule("aten::index_add", "aten::index_copy")
def index_add(op: OpCall) -> Result:
    """Write slices at positions of one dimension."""
    x, source = op.tensor("self"), op.tensor("source")
    axis = op.axis("dim", len(x.dims))
    _look_up(op, x.dims[axis], op.tensor("index"))
    for i, (a, b) in enumerate(zip(x.dims, source.dims, strict=True)):
        if i != axis:
            op.unify(a, b)
    return list(x.dims)


@op_rule("aten::masked_fill", "aten::where")
def masked(op: OpCall) -> Result:
    """Pointwise choice."""
    return broadcast(op, op.operands())


@op_rule("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::item", "aten::_is_all_true")
def to_python(op: OpCall) -> Result:
    """A value that Python reads; control flow is fixed by the recorded run."""
    return tuple([Dim(size) for size in shape] if shape is not None else None for shape in op.shapes)
