"""Hashes of examples that do not depend on padding, on the batch or on the device.

Row r with values v_i at the positions i that count, i from the first of them, has the two sums (mod 2^64)::

    y_i = s((s(v_i a_i + b_i, 32)) c_i, 29)    with s(x, k) = x xor (x >> k)
    h_1 = sum_i y_i,    h_2 = sum_i y_i d_i

with fixed random a, c, d (odd) and b for every position, made by SplitMix64 (Steele, Lea, Flood: Fast Splittable
Pseudorandom Number Generators, OOPSLA 2014). The multiplications are those of multilinear hashing (Lemire, Kaser:
Strongly Universal String Hashing is Fast, The Computer Journal, 2014); the shifts bring high bits down, which
multiplication cannot. Integers hash by value, whatever their dtype; floats by their bits. Nothing waits for a device.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUM_TABLES = 4
_SMALLEST_TABLE = 1024
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def row_hashes(tensor: Tensor, counts: Tensor | None, label: str) -> Tensor:
    """Hash every row of one input.

    Args:
        tensor: [rows, ...], integers, bools or floats.
        counts: Bool, [rows, length], which positions of ``tensor`` [rows, length, ...] are no padding; None: all.
        label: Name of the input; others give other hashes.

    Returns:
        int64, [rows, 2].
    """
    shape = tensor.shape[1:] if counts is None else tensor.shape[2:]
    if counts is None:
        hashes = _sums(_packed(tensor), None, None)
    else:
        width = max(tensor[:1, :1].numel(), 1)
        positions = (torch.arange(counts.shape[1], device=counts.device) - first_counted(counts)).clamp_min(0)
        if width > 1:
            within = torch.arange(width, device=counts.device)
            positions = (positions.unsqueeze(2) * width + within).flatten(1)
            counts = counts.unsqueeze(2).expand(-1, -1, width).flatten(1)
        hashes = _sums(_integers(tensor).flatten(1), positions, counts)
    return _finalize(hashes + _salt(f"{label} {list(shape)}", tensor.device))


def combine(hashes: Tensor) -> Tensor:
    """Return one hash for the hashes of several rows, in their order.

    Args:
        hashes: int64, [batch, rows, 2].

    Returns:
        int64, [batch, 2].
    """
    return row_hashes(hashes.flatten(1), None, "rows")


def first_counted(counts: Tensor) -> Tensor:
    """Return the first position of each row that counts, [rows, 1]; 0 if none does."""
    if counts.shape[1] == 0:
        return counts.new_zeros((len(counts), 1), dtype=torch.long)
    return counts.long().argmax(1, keepdim=True)


def _sums(values: Tensor, positions: Tensor | None, counts: Tensor | None) -> Tensor:
    """Return [h_1, h_2] of every row.

    Args:
        values: int64, [rows, n].
        positions: int64, [rows, n]; None: 0 to n - 1.
        counts: Bool, [rows, n]; None: all.
    """
    tables = _tables(values.shape[1], values.device)[:, : values.shape[1]]
    a, b, c, d = tables if positions is None else tables[:, positions]
    mixed = values * a
    mixed += b
    mixed ^= _shifted(mixed, 32)
    mixed *= c
    mixed ^= _shifted(mixed, 29)
    if counts is not None:
        mixed *= counts
    return torch.stack([mixed.sum(1), (mixed * d).sum(1)], dim=1)


def _finalize(x: Tensor) -> Tensor:
    """Return SplitMix64's output function of every number."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _tables(size: int, device: torch.device) -> Tensor:
    """Return the factors of at least ``size`` positions, int64, [4, positions]; they are the same on all devices."""
    rounded = max(_SMALLEST_TABLE, 1 << max(size - 1, 0).bit_length())
    return _made_tables(rounded, device)


@lru_cache(maxsize=32)
def _made_tables(size: int, device: torch.device) -> Tensor:
    counter = torch.arange(1, _NUM_TABLES * size + 1).view(size, _NUM_TABLES).T.contiguous()
    tables = _finalize(counter * _signed(_STEP))
    tables[[0, 2, 3]] |= 1
    return tables.to(device)


@lru_cache(maxsize=256)
def _salt(label: str, device: torch.device) -> Tensor:
    digest = hashlib.sha256(label.encode()).digest()
    return torch.tensor([int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8)], device=device)


def _packed(tensor: Tensor) -> Tensor:
    """Return each row as 64-bit integers; floats take as few as they fill, which is less to compute."""
    flat = tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
    if tensor.is_floating_point() and flat.numel() and flat.shape[1] * flat.element_size() % 8 == 0:
        return flat.contiguous().view(torch.int64)
    return _integers(flat)


def _integers(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.contiguous().view(_BITS[tensor.element_size()])
    return tensor.long()


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Return the unsigned shift to the right."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    """Return the int64 of the same bits as an unsigned number."""
    return number - (1 << 64) if number >= 1 << 63 else number
