import pytest
import torch
from torch import Tensor

from hf_compress.quantization.fake import fake_quantize, to_integers, to_values
from hf_compress.quantization.granularity import PER_TENSOR, per_channel, per_group
from hf_compress.quantization.grid import Grid

GRIDS = [
    Grid(num_bits=num_bits, signed=signed, symmetric=symmetric)
    for num_bits in (2, 4, 8)
    for signed in (True, False)
    for symmetric in (True, False)
]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_bit_equal_to_torchs_own_kernel(grid: Grid) -> None:
    x = values(7, 30)
    low, high = x.amin(1) * 0.6, x.amax(1) * 0.6  # some values are clipped
    scale, zero_point = grid.parameters(low, high)
    zeros = torch.zeros(7, dtype=torch.int32) if zero_point is None else zero_point
    expected = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, grid.low, grid.high)
    spread = None if zero_point is None else zero_point[:, None]
    assert torch.equal(fake_quantize(x, grid, scale[:, None], spread), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(0), per_channel(-1), per_group(5)], ids=str)
def test_integers_are_those_of_torchao_for_every_granularity(grid: Grid, granularity) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = values(6, 20)
    block = {"tensor": (6, 20), "channel": (1, 20), "group": (1, 5)}[granularity.kind]
    block = (6, 1) if granularity.dim == -1 else block
    blocks = granularity.blocks(x)
    scale, zero_point = grid.parameters(blocks.amin(1), blocks.amax(1))
    view = granularity.view(x)
    spread = [None if each is None else granularity.spread(each, x.shape) for each in (scale, zero_point)]
    integers = granularity.apply(lambda v, s, z: to_integers(v, grid, s, z), x, scale, zero_point)
    shape = [size // part for size, part in zip(x.shape, block, strict=True)]
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    given = (scale.view(shape), zeros.view(shape))
    expected = primitives.quantize_affine(x, block, *given, grid.dtype, grid.low, grid.high)
    assert integers.dtype == grid.dtype and torch.equal(integers, expected)
    back = granularity.restore(to_values(granularity.view(integers), *spread))
    assert torch.equal(back, primitives.dequantize_affine(expected, block, *given, grid.dtype, grid.low, grid.high))
    assert torch.equal(back, granularity.restore(fake_quantize(view, grid, *spread)))


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if not grid.slack], ids=str)
def test_gradients_are_those_of_torchs_own_kernel(grid: Grid) -> None:
    x, upstream = values(7, 30), values(7, 30, seed=1)
    scale, zero_point = grid.parameters(x.amin(1) * 0.6, x.amax(1) * 0.6)
    zeros = torch.zeros(7, dtype=torch.int32) if zero_point is None else zero_point
    gradients = []
    for mine in (True, False):
        leaf = x.clone().requires_grad_()
        if mine:
            result = fake_quantize(leaf, grid, scale[:, None], None if zero_point is None else zero_point[:, None])
        else:
            result = torch.fake_quantize_per_channel_affine(leaf, scale, zeros, 0, grid.low, grid.high)
        result.backward(upstream)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert 0 < int((gradients[0] == 0).sum()) < x.numel()


def test_a_restricted_grid_has_no_lowest_integer_and_no_slack() -> None:
    x = torch.tensor([-130.0, -128.0, -127.4, 126.0, 127.4, 128.0], requires_grad=True)
    grid = Grid(restricted=True)
    result = fake_quantize(x, grid, torch.ones(1))
    assert result.tolist() == [-127.0, -127.0, -127.0, 126.0, 127.0, 127.0]
    result.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    with_slack = torch.tensor([-129.4, 128.4, 129.0], requires_grad=True)
    fake_quantize(with_slack, Grid(), torch.ones(1)).sum().backward()
    assert with_slack.grad.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_stays_zero_and_covered_saves_the_mask(grid: Grid) -> None:
    x = values(3, 8)
    x[:, 2] = 0.0
    scale, zero_point = grid.parameters(x.amin(1), x.amax(1))
    spread = (scale[:, None], None if zero_point is None else zero_point[:, None])
    leaf = x.requires_grad_()
    covered = fake_quantize(leaf, grid, *spread, covered=True)
    assert torch.equal(covered[:, 2], torch.zeros(3))
    assert torch.equal(covered, fake_quantize(leaf, grid, *spread))
    assert len(covered.grad_fn.saved_tensors) == 0
    covered.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_dtypes_are_kept_and_arithmetic_is_in_float32() -> None:
    x = values(3, 8).to(torch.bfloat16)
    scale = torch.full((1, 1), 0.1)
    result = fake_quantize(x, Grid(), scale)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, fake_quantize(x.float(), Grid(), scale).to(torch.bfloat16))


def test_dequantizing_leaves_the_integers_alone() -> None:
    integers = torch.tensor([[1.0, 2.0]])
    assert to_values(integers, torch.ones(1), torch.tensor([1])).tolist() == [[0.0, 1.0]]
    assert integers.tolist() == [[1.0, 2.0]]
