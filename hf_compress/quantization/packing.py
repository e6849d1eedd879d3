"""Integers of 2 to 8 bits packed without gaps, as they lie in a file.

Bits go least significant first, so 4-bit integers lie two to a byte, the first in the low half. Where a row fills whole
int32 words, ``pack(...).view(torch.int32)`` is compressed-tensors' ``weight_packed`` for 2, 4 and 8 bits on a
little-endian machine: both store q + 2^(bits - 1) for signed grids.
"""

import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.quantization.grid import Grid


def pack(integers: Tensor, grid: Grid) -> Tensor:
    """Pack integers along the last dimension; each row starts at a byte of its own.

    Args:
        integers: [..., n], any integer dtype.
        grid: Their format.

    Returns:
        uint8 [..., ceil(n * bits / 8)]; unused bits of the last byte of a row are 0.

    Raises:
        TargetError: If an integer is not on the grid.
    """
    if integers.numel() and not bool(((integers >= grid.low) & (integers <= grid.high)).all()):
        found = f"{int(integers.min())} to {int(integers.max())}"
        raise TargetError(f"pack: got integers from {found}; {grid.num_bits} bits hold {grid.low} to {grid.high}.")
    stored = integers.to(torch.int16) + _offset(grid)
    bits = (stored.unsqueeze(-1) >> _places(grid.num_bits, integers.device)) & 1
    bits = torch.nn.functional.pad(bits.flatten(-2), (0, -bits.shape[-2] * grid.num_bits % 8))
    octets = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    return (octets << _places(8, integers.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, grid: Grid, length: int) -> Tensor:
    """Return what ``pack`` was given.

    Args:
        packed: uint8 [..., ceil(length * bits / 8)].
        grid: The format of the integers.
        length: Integers in a row, n.

    Returns:
        ``grid.dtype`` [..., length].

    Raises:
        TargetError: If a row has another number of bytes.
    """
    if packed.shape[-1] != -(-length * grid.num_bits // 8):
        raise TargetError(
            f"unpack: got {packed.shape[-1]} bytes a row; {length} integers of {grid.num_bits} bits take "
            f"{-(-length * grid.num_bits // 8)}."
        )
    bits = (packed.to(torch.int16).unsqueeze(-1) >> _places(8, packed.device)) & 1
    bits = bits.flatten(-2)[..., : length * grid.num_bits].reshape(*packed.shape[:-1], length, grid.num_bits)
    stored = (bits << _places(grid.num_bits, packed.device)).sum(-1)
    return (stored - _offset(grid)).to(grid.dtype)


def _offset(grid: Grid) -> int:
    return 1 << (grid.num_bits - 1) if grid.signed else 0


def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int16, device=device)
