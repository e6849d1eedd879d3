import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.packing import pack, unpack


def random_integers(grid: Grid, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.low, grid.high + 1, shape, generator=generator).to(grid.dtype)


def packed_by_hand(row: list[int], grid: Grid) -> list[int]:
    """One big Python integer, little-endian."""
    offset = 2 ** (grid.num_bits - 1) if grid.signed else 0
    number = sum((value + offset) << (grid.num_bits * i) for i, value in enumerate(row))
    return list(number.to_bytes(-(-len(row) * grid.num_bits // 8), "little"))


@given(
    num_bits=st.integers(2, 8),
    signed=st.booleans(),
    shape=st.lists(st.integers(0, 11), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_packing_is_little_endian_without_gaps_and_comes_back(
    num_bits: int, signed: bool, shape: list[int], seed: int
) -> None:
    grid = Grid(num_bits=num_bits, signed=signed)
    integers = random_integers(grid, *shape, seed=seed)
    packed = pack(integers, grid)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] * num_bits // 8))
    for row, bits in zip(integers.reshape(-1, shape[-1] or 1), packed.reshape(-1, packed.shape[-1] or 1), strict=True):
        assert bits.tolist() == packed_by_hand(row.tolist(), grid)
    back = unpack(packed, grid, shape[-1])
    assert back.dtype == grid.dtype and torch.equal(back, integers)


def test_four_bits_lie_two_to_a_byte_the_first_in_the_low_half() -> None:
    integers = torch.tensor([[-8, 7, 0, 1, 3]], dtype=torch.int8)
    assert pack(integers, Grid(num_bits=4)).tolist() == [[0xF0, 0x98, 0x0B]]


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_whole_words_are_the_layout_of_compressed_tensors(num_bits: int) -> None:
    grid = Grid(num_bits=num_bits)
    integers = random_integers(grid, 3, 64)
    expected = torch.zeros(3, 64 * num_bits // 32, dtype=torch.int64)
    per_word = 32 // num_bits
    for i in range(64):  # unsigned values, eight 4-bit ones to an int32 from its low end
        expected[:, i // per_word] |= (integers[:, i].long() + 2 ** (num_bits - 1)) << (num_bits * (i % per_word))
    words = pack(integers, grid).view(torch.int32)
    assert torch.equal(words, expected.to(torch.int32))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TargetError, match="-9 to 7; 4 bits hold -8 to 7"):
        pack(torch.tensor([-9, 7]), Grid(num_bits=4))
    with pytest.raises(TargetError, match="got 3 bytes a row; 4 integers of 4 bits take 2"):
        unpack(torch.zeros(3, dtype=torch.uint8), Grid(num_bits=4), 4)
