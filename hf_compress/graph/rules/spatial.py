"""Operators that change the spatial sizes of images and signals, channel by channel."""

from hf_compress.graph.dims import Dim, split_product
from hf_compress.graph.op_rules import OpCall, Result, op_rule


@op_rule("aten::pixel_shuffle")
def pixel_shuffle(op: OpCall) -> Result:
    """[..., c * r * r, h, w] -> [..., c, h * r, w * r]."""
    *batch, channels, _, _ = op.tensor("self").dims
    *_, new, height, width = op.shapes[0] or ()
    outer, inner = split_product(channels, new)
    op.mark(inner, "selected")
    return [*batch, outer, Dim(height), Dim(width)]


@op_rule(
    "aten::upsample_bilinear2d", "aten::upsample_bicubic2d", "aten::upsample_nearest2d", "aten::upsample_nearest1d",
    "aten::upsample_linear1d", "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa",
    "aten::upsample_nearest3d", "aten::upsample_trilinear3d", "aten::reflection_pad1d", "aten::reflection_pad2d",
    "aten::replication_pad1d", "aten::replication_pad2d",
)  # fmt: skip
def resample(op: OpCall) -> Result:
    """[n, c, ...]: each channel by itself, another spatial size."""
    x, shape = op.operands()[0], op.shapes[0] or ()
    spatial = [Dim(size) for size in shape[2:]]
    for dim in [*x.dims[2:], *spatial]:
        op.mark(dim, "spatial")
    return [*x.dims[:2], *spatial]


@op_rule("aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool1d", "aten::avg_pool2d", "aten::max_pool2d_with_indices")
def pooling(op: OpCall) -> Result:
    """[n, c, ...]: pool over space."""
    x = op.tensor("self")
    for dim in x.dims[2:]:
        op.mark(dim, "spatial")
    results = [[*x.dims[:2], *(Dim(size) for size in (shape or ())[2:])] for shape in op.shapes]
    return results[0] if len(results) == 1 else tuple(results)
