import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.errors import ConfigError, TargetError
from hf_compress.quantization.granularity import PER_TENSOR, PER_TOKEN, Granularity, per_channel, per_group

SHAPE = (4, 3, 6)


def block_of(granularity: Granularity, index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The number of the block that an element belongs to, from the definition."""
    if granularity.kind == "tensor":
        return 0
    if granularity.kind == "channel":
        return index[granularity.dim]
    if granularity.kind == "token":
        return int(np.ravel_multi_index(index[:-1], shape[:-1]))
    return int(np.ravel_multi_index(index, shape)) // granularity.size


CASES = [PER_TENSOR, PER_TOKEN, *(per_channel(dim) for dim in range(-3, 3)), per_group(1), per_group(2), per_group(6)]


@pytest.mark.parametrize("granularity", CASES, ids=str)
def test_blocks_and_views_agree_with_the_definition(granularity: Granularity) -> None:
    x = torch.arange(72.0).reshape(SHAPE)
    owner = torch.empty(SHAPE)
    for index in itertools.product(*map(range, SHAPE)):
        owner[index] = block_of(granularity, index, SHAPE)
    blocks = granularity.blocks(x)
    assert len(blocks) == granularity.num_blocks(SHAPE) == int(owner.max()) + 1
    for number, row in enumerate(blocks):
        assert sorted(row.tolist()) == x[owner == number].tolist()
    spread = granularity.spread(torch.arange(float(len(blocks))), SHAPE)
    assert torch.equal(granularity.restore(spread.expand_as(granularity.view(x))), owner)
    assert torch.equal(granularity.restore(granularity.view(x)), x)


def test_a_weight_gets_the_shapes_that_kernels_expect() -> None:
    weight = torch.zeros(8, 12)
    assert per_channel(0).spread(torch.zeros(8), weight.shape).shape == (8, 1)
    assert per_group(4).spread(torch.zeros(24), weight.shape).shape == (8, 3, 1)
    assert PER_TENSOR.spread(torch.zeros(1), weight.shape).shape == (1, 1)
    assert PER_TOKEN.spread(torch.zeros(6), (2, 3, 5)).shape == (2, 3, 1)


def test_views_share_memory() -> None:
    x = torch.zeros(4, 6)
    for granularity in (PER_TENSOR, PER_TOKEN, per_channel(0), per_channel(-1), per_group(3)):
        assert granularity.view(x).data_ptr() == granularity.blocks(x[:, :]).data_ptr() == x.data_ptr() or (
            granularity.dim == -1
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "chanel"}, "closest match: 'channel'"),
        ({"kind": "group"}, "size"),
        ({"kind": "group", "size": -1}, "size"),
        ({"kind": "token", "size": 4}, "size"),
        ({"kind": "token", "dim": 1}, "dim"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Granularity(**settings)


@pytest.mark.parametrize("method", ["view", "blocks"])
def test_an_uneven_last_group_is_refused(method: str) -> None:
    with pytest.raises(TargetError, match=r"10 inputs .* multiple of size=4"):
        getattr(per_group(4), method)(torch.zeros(3, 10))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TargetError, match="dimension 2"):
        per_channel(2).blocks(torch.zeros(3, 10))
    with pytest.raises(TargetError, match="got 5 ranges"):
        per_channel(0).spread(torch.zeros(5), (3, 10))
    number: Tensor = torch.tensor(1.0)
    with pytest.raises(TargetError, match="no last dimension"):
        PER_TOKEN.blocks(number)
    assert PER_TENSOR.blocks(number).shape == (1, 1)
