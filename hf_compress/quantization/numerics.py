"""Symmetric integer quantization as pure functions of tensors.

Rounding, clamping and the scale's formula are those of torchao's ``Int8Tensor``, operation by operation, so that
what is simulated in training is bit for bit what the integer kernel is given.
"""

from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
"""Smallest scale, for every dtype; an all-zero row would divide by zero."""


def integer_range(num_bits: int) -> tuple[int, int]:
    """Return the lowest and the highest signed integer of ``num_bits`` bits, e.g. (-128, 127)."""
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


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
    low, high = integer_range(num_bits)
    # Two reductions without a temporary are cheaper than abs().amax(), and aminmax() is slower than both.
    largest = torch.maximum(-x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True))
    # The division happens in the dtype of x, as the kernel's does; only the result becomes float32.
    return largest.div((high - low) / 2).clamp_(min=EPS).to(torch.float32)


def quantize(x: Tensor, scale: Tensor, *, num_bits: int = 8) -> Tensor:
    """Return clamp(round(x / scale), low, high) as int8; ties go to the even integer.

    Args:
        x: Values, any shape.
        scale: Steps in float32, broadcastable to ``x``.
        num_bits: Bits per integer, at most 8.
    """
    return _to_grid(x, scale, num_bits).to(torch.int8)


def dequantize(integers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return integers * scale in ``dtype``."""
    return integers.to(dtype).mul(scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor, *, num_bits: int = 8, covered: bool = False) -> Tensor:
    """Quantize and dequantize, differentiable with respect to ``x``.

    The gradient passes straight through inside the range of the grid and is zero outside (Jacob et al. 2018,
    arXiv:1712.05877, section 3). The ends belong to the range, up to one step of clipping: under a symmetric scale
    the row's own maximum rounds to high + 1.

    Args:
        x: Values, any shape.
        scale: Steps in float32, broadcastable to ``x``; treated as a constant.
        num_bits: Bits per integer, at most 8.
        covered: Promise that nothing lies outside the range (or gets no gradient anyway), as with a scale computed
            from ``x`` itself. Saves the memory of a mask.

    Returns:
        Values on the grid, same shape and dtype as ``x``.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, num_bits, covered)  # type: ignore[no-untyped-call]
    return result


def _to_grid(x: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    low, high = integer_range(num_bits)
    # x * (1 / scale), not x / scale: they differ in the last bit, and the kernel multiplies.
    return x.mul(1.0 / scale).round_().clamp_(low, high)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator; cheaper than ``x + (q - x).detach()``, which keeps two more tensors alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, num_bits: int, covered: bool) -> Tensor:
        ctx.covered = covered
        if covered:
            return _to_grid(x, scale, num_bits).mul_(scale).to(x.dtype)
        low, high = integer_range(num_bits)
        steps = x.mul(1.0 / scale).round_()
        ctx.save_for_backward((steps >= low - 1) & (steps <= high + 1))
        return steps.clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        if not ctx.covered:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None
