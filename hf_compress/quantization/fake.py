"""Rounding to a grid: to integers and back, and both in one step with a gradient.

Operation by operation as in torchao's ``Int8Tensor`` and ``quantize_affine``, so that what is simulated in training is
bit for bit what an integer kernel is given. Steps and zero points broadcast: lay them out with ``Granularity.spread``
and give ``Granularity.view(x)``.
"""

from typing import Any

import torch
from torch import Tensor

from hf_compress.quantization.grid import Grid


def to_integers(x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return clamp(round(x / scale) + zero_point, low, high); ties go to the even integer.

    Args:
        x: Values, any shape.
        grid: The format.
        scale: Steps in float32, broadcastable to ``x``, with at least one dimension.
        zero_point: Integers, likewise; None = 0.

    Returns:
        Integers in ``grid.dtype``, same shape as ``x``.
    """
    return _to_grid(x, scale, zero_point, grid.low, grid.high).to(grid.dtype)


def to_values(
    integers: Tensor, scale: Tensor, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return (integers - zero_point) * scale in ``dtype``."""
    values = integers.to(dtype)
    if zero_point is not None:
        values = values - zero_point.to(dtype)
    return values.mul(scale).to(dtype)


def fake_quantize(
    x: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None = None, *, covered: bool = False
) -> Tensor:
    """Quantize and dequantize, differentiable with respect to ``x``.

    The gradient passes straight through inside the range of the grid and is zero outside (Jacob et al. 2018,
    arXiv:1712.05877, section 3). What rounds to an integer of the grid is inside; under the full symmetric range so is
    one step beyond, where the value lies that defined the step (``Grid.slack``).

    Args:
        x: Values, any shape.
        grid: The format.
        scale: Steps in float32, broadcastable to ``x``, with at least one dimension; treated as a constant.
        zero_point: Integers, likewise; None = 0.
        covered: Promise that nothing lies outside the range (or gets no gradient anyway), as with a range computed
            from ``x`` itself. Saves the memory of a mask.

    Returns:
        Values on the grid, same shape and dtype as ``x``.
    """
    slack = None if covered else grid.slack
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, grid.low, grid.high, slack)  # type: ignore[no-untyped-call]
    return result


def _to_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int) -> Tensor:
    return _steps(x, scale, zero_point).clamp_(low, high)


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    # x * (1 / scale), not x / scale: they differ in the last bit, and the kernel multiplies.
    steps = x.mul(scale.reciprocal()).round_()  # 1.0 / scale would be the same, and multiply by 1
    return steps if zero_point is None else steps.add_(zero_point)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator; cheaper than ``x + (q - x).detach()``, which keeps two more tensors alive."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, slack: int | None
    ) -> Tensor:
        ctx.covered = slack is None
        steps = _steps(x, scale, zero_point)
        if slack is not None:
            ctx.save_for_backward((steps >= low - slack) & (steps <= high + slack))
        steps.clamp_(low, high)
        if zero_point is not None:
            steps.sub_(zero_point)
        return steps.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.covered:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None, None, None
