"""Operators that change the sizes of images and signals leave every channel by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, PreTrainedModel

from hf_compress import dimension_groups
from hf_compress.graph.dims import Dim, factors, find
from hf_compress.graph.op_rules import OpCall, Operand
from hf_compress.registry import op_rules


class Net(PreTrainedModel):
    """Two convolutions with an operator between them."""

    config_class = BertConfig

    def __init__(
        self, operator: Callable[[Tensor], Tensor], channels: tuple[int, int] = (10, 10), dims: int = 2
    ) -> None:
        super().__init__(BertConfig())
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.second = kind(3, channels[0], 3), kind(channels[1], 4, 1)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operator(self.first(x)))


RESAMPLED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    **{
        f"{mode} {dims}": (dims, lambda x, mode=mode: functional.interpolate(x, scale_factor=2, mode=mode))  # type: ignore[misc]
        for mode, dims in (
            ("nearest", 1), ("linear", 1), ("nearest", 2), ("bilinear", 2), ("bicubic", 2), ("nearest", 3),
            ("trilinear", 3),
        )
    },
    "bilinear, smooth": (2, lambda x: functional.interpolate(x, size=(3, 3), mode="bilinear", antialias=True)),
    "bicubic, smooth": (2, lambda x: functional.interpolate(x, size=(3, 3), mode="bicubic", antialias=True)),
    "reflection 1": (1, lambda x: functional.pad(x, (1, 1), mode="reflect")),
    "reflection 2": (2, lambda x: functional.pad(x, (1, 1, 2, 0), mode="reflect")),
    "replication 1": (1, lambda x: functional.pad(x, (1, 1), mode="replicate")),
    "replication 2": (2, lambda x: functional.pad(x, (1, 1, 2, 0), mode="replicate")),
    "adaptive average 1": (1, lambda x: functional.adaptive_avg_pool1d(x, 2)),
    "adaptive average 2": (2, lambda x: functional.adaptive_avg_pool2d(x, (2, 3))),
    "average": (2, lambda x: functional.avg_pool2d(x, 2)),
    "maximum": (2, lambda x: functional.max_pool2d(x, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", RESAMPLED)
def test_channels_pass_through(name) -> None:
    dims, operator = RESAMPLED[name]
    groups = dimension_groups(Net(operator, dims=dims), {"x": torch.randn(2, 3, *[7] * dims)})
    (group,) = [each for each in groups if each.num_units == 10]
    assert group.frozen is None
    found = {(each.parameter, each.dim) for each in group.slices}
    assert found == {("first.weight", 0), ("first.bias", 0), ("second.weight", 1)}


def test_shuffled_pixels_leave_groups_of_channels() -> None:
    net = Net(lambda x: functional.pixel_shuffle(x, 2), (20, 5))
    groups = dimension_groups(net, {"x": torch.randn(2, 3, 6, 6)})
    (channels,) = [each for each in groups if each.num_units == 5]
    (within,) = [
        each for each in groups if each.num_units == 4 and any(s.parameter == "first.weight" for s in each.slices)
    ]
    assert channels.frozen is None and within.frozen is not None
    index = {(each.parameter, each.dim): each.index.tolist() for each in channels.slices}
    assert index["first.weight", 0] == [[4 * unit + k for k in range(4)] for unit in range(5)]
    assert index["second.weight", 1] == [[unit] for unit in range(5)]


def call(name: str, dims: list[Dim], *shapes: tuple[int, ...] | None) -> OpCall:
    return OpCall(name, "module", {"self": Operand(dims)}, list(shapes))


def apply(op: OpCall) -> Any:
    return op_rules.get(op.name)(op)


@pytest.mark.parametrize("name", ["aten::upsample_nearest1d", "aten::avg_pool2d"])
def test_results_have_fresh_spatial_dimensions(name) -> None:
    dims = [Dim(2), Dim(5), Dim(6), Dim(7)]
    op = call(name, dims, (2, 5, 3, 4))
    result = apply(op)
    assert result[:2] == dims[:2]
    assert [dim.size for dim in result[2:]] == [3, 4]
    assert {find(mark.dim) for mark in op.marks} >= {dims[2], dims[3]}
    assert {mark.role for mark in op.marks} == {"spatial"}
    assert not {find(mark.dim) for mark in op.marks} & {dims[0], dims[1]}


def test_pooling_may_return_positions_too() -> None:
    dims = [Dim(2), Dim(5), Dim(6), Dim(7)]
    values, positions = apply(call("aten::max_pool2d_with_indices", dims, (2, 5, 3, 4), (2, 5, 3, 4)))
    for result in (values, positions):
        assert result[:2] == dims[:2]
        assert [dim.size for dim in result] == [2, 5, 3, 4]


def test_the_inner_factor_of_shuffled_channels_is_chosen_by_place() -> None:
    dims = [Dim(2), Dim(12), Dim(5), Dim(7)]
    op = call("aten::pixel_shuffle", dims, (2, 3, 10, 14))
    batch, channels, *spatial = apply(op)
    outer, inner = factors(dims[1])
    assert (outer.size, inner.size) == (3, 4)
    assert batch is dims[0] and find(channels) is find(outer)
    assert [dim.size for dim in spatial] == [10, 14]
    assert [(find(mark.dim), mark.role) for mark in op.marks] == [(find(inner), "selected")]
