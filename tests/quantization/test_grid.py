import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_numerics import symmetric_scale
from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.quantization.grid import EPS, Grid

BITS = range(2, 9)


def rows(seed: int = 0) -> Tensor:
    """Rows of many sizes, of one sign, constant, and zero."""
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    x[1] = x[1].abs() + 1
    x[2] = -x[2].abs() - 1
    x[3] *= 1e4
    x[4] *= 1e-4
    x[5] = 0.3
    return x


@pytest.mark.parametrize("num_bits", BITS)
def test_the_ends_are_those_of_the_integers_of_that_many_bits(num_bits: int) -> None:
    assert (Grid(num_bits=num_bits).low, Grid(num_bits=num_bits).high) == (-(2**num_bits) // 2, 2**num_bits // 2 - 1)
    restricted = Grid(num_bits=num_bits, restricted=True)
    assert restricted.low == -restricted.high == -(2**num_bits // 2 - 1)
    unsigned = Grid(num_bits=num_bits, signed=False)
    assert (unsigned.low, unsigned.high, unsigned.dtype) == (0, 2**num_bits - 1, torch.uint8)
    assert torch.iinfo(Grid(num_bits=8).dtype).min == Grid(num_bits=8).low


@pytest.mark.parametrize("settings", [{"num_bits": 1}, {"num_bits": 9}, {"num_bits": True}, {"num_bits": 4.0}])
def test_other_numbers_of_bits_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"num_bits: got .* from 2 to 8"):
        Grid(**settings)


@pytest.mark.parametrize("settings", [{"signed": False}, {"symmetric": False}])
def test_only_symmetric_signed_grids_can_be_restricted(settings: dict) -> None:
    with pytest.raises(ConfigError, match="restricted"):
        Grid(restricted=True, **settings)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_affine_parameters_are_bit_equal_to_torchao(num_bits: int, signed: bool) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    grid, x = Grid(num_bits=num_bits, signed=signed, symmetric=False), rows()
    scale, zero_point = grid.parameters(x.amin(1), x.amax(1))
    expected = primitives.choose_qparams_affine(
        x, primitives.MappingType.ASYMMETRIC, (1, 20), grid.dtype, grid.low, grid.high, eps=EPS
    )
    assert torch.equal(scale, expected[0])
    assert torch.equal(zero_point, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_full_symmetric_range_is_that_of_the_int8_kernel(dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    x = rows()[:, :16].to(dtype)
    scale, zero_point = Grid().parameters(x.amin(1), x.amax(1))
    assert zero_point is None
    assert torch.equal(scale[:, None], torchao.Int8Tensor.from_hp(x, torchao.PerRow()).scale)
    assert torch.equal(scale[:, None], symmetric_scale(x))


def test_steps_that_can_be_checked_by_hand() -> None:
    low, high = torch.tensor([-6.0]), torch.tensor([3.0])
    assert Grid(num_bits=4).parameters(low, high)[0].item() == pytest.approx(6 / 7.5)
    assert Grid(num_bits=4, restricted=True).parameters(low, high)[0].item() == pytest.approx(6 / 7)
    assert Grid(num_bits=4, signed=False).parameters(low, high)[0].item() == pytest.approx(3 / 15)
    scale, zero_point = Grid(num_bits=4, signed=False, symmetric=False).parameters(low, high)
    assert (scale.item(), zero_point.item()) == (pytest.approx(9 / 15), 10)


@given(
    ends=st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)),
    num_bits=st.integers(2, 8),
    signed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_affine_grid_holds_zero_and_covers_the_range_to_half_a_step(
    ends: tuple[float, float], num_bits: int, signed: bool
) -> None:
    grid = Grid(num_bits=num_bits, signed=signed, symmetric=False)
    low, high = torch.tensor([min(ends)]), torch.tensor([max(ends)])
    scale, zero_point = grid.parameters(low, high)
    assert grid.low <= zero_point.item() <= grid.high and zero_point.dtype == torch.int32
    first, last = ((end - zero_point.item()) * scale.item() for end in (grid.low, grid.high))
    slack = scale.item() * 0.5001
    assert first <= min(low.item(), 0) + slack and last >= max(high.item(), 0) - slack


def test_a_range_of_zeros_gets_the_smallest_step() -> None:
    zero = torch.zeros(1)
    for grid in (Grid(), Grid(signed=False), Grid(symmetric=False)):
        assert grid.parameters(zero, zero)[0].item() == pytest.approx(EPS)
