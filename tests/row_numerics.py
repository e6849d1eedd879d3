"""Symmetric integers with one step per row, as scheme int8_dynamic has them, in a few lines for tests.

Rounding, clamping and the scale's formula are those of torchao's ``Int8Tensor``, operation by operation, so that
what is simulated in training is bit for bit what the integer kernel is given. The general form, with zero points and
other grids, is in ``hf_compress.quantization.fake``.
"""

import torch
from torch import Tensor

from hf_compress.quantization import fake
from hf_compress.quantization.grid import EPS, Grid

__all__ = ["EPS", "dequantize", "fake_quantize", "integer_range", "quantize", "symmetric_scale"]

_GRIDS = {num_bits: Grid(num_bits=num_bits) for num_bits in range(2, 9)}


def integer_range(num_bits: int) -> tuple[int, int]:
    """Return the lowest and the highest signed integer of ``num_bits`` bits, e.g. (-128, 127)."""
    return _GRIDS[num_bits].low, _GRIDS[num_bits].high


@torch.no_grad()
def symmetric_scale(x: Tensor, *, num_bits: int = 8) -> Tensor:
    """Return the step of a symmetric grid that covers each row: max|x| / ((high - low) / 2).

    For 8 bits the divisor is 127.5, so the largest positive value of a row is half a step beyond 127 and is
    clipped to 127.

    Args:
        x: Values, [..., channels]; one scale per row of the last dimension.
        num_bits: Bits per integer.

    Returns:
        Scales in float32, [..., 1], at least ``EPS``.
    """
    # Two reductions without a temporary are cheaper than abs().amax(), and aminmax() is slower than both.
    return _GRIDS[num_bits].parameters(x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True))[0]


def quantize(x: Tensor, scale: Tensor, *, num_bits: int = 8) -> Tensor:
    """Return clamp(round(x / scale), low, high) as int8; ties go to the even integer.

    Args:
        x: Values, any shape.
        scale: Steps in float32, broadcastable to ``x``.
        num_bits: Bits per integer, at most 8.
    """
    return fake.to_integers(x, _GRIDS[num_bits], scale)


def dequantize(integers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return integers * scale in ``dtype``."""
    return fake.to_values(integers, scale, dtype=dtype)


def fake_quantize(x: Tensor, scale: Tensor, *, num_bits: int = 8, covered: bool = False) -> Tensor:
    """Quantize and dequantize, differentiable with respect to ``x``; see ``hf_compress.quantization.fake``.

    Args:
        x: Values, any shape.
        scale: Steps in float32, broadcastable to ``x``; treated as a constant.
        num_bits: Bits per integer, at most 8.
        covered: Promise that nothing lies outside the range (or gets no gradient anyway), as with a scale computed
            from ``x`` itself. Saves the memory of a mask.

    Returns:
        Values on the grid, same shape and dtype as ``x``.
    """
    return fake.fake_quantize(x, _GRIDS[num_bits], scale, covered=covered)
