"""Learned step size quantization: the step, and an offset if wanted, are trained by gradient descent like a weight.

A step must stay positive: after each update of the optimizer, ``step.clamp_(min=EPS)``. Groups and channels: give
``Granularity.view(x)`` and a step laid out by ``Granularity.spread``.
"""

from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.quantization.clipping import Range, mse_range
from hf_compress.quantization.grid import EPS, Grid
from hf_compress.quantization.histogram import Histogram


@torch.no_grad()
def initial_step(blocks: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
    """Return the first step of LSQ: 2 mean|v| / sqrt(Q_P).

    Source: Esser et al. 2020, arXiv:1902.08153, section 2.1.

    Args:
        blocks: Weights, or the activations of the first batch, [blocks, values] (``Granularity.blocks``).
        grid: The format; Q_P is its highest integer.
        keep: Bool, same shape: False = leave out.

    Returns:
        float32 [blocks], at least ``EPS``.
    """
    magnitudes = blocks.detach().to(torch.float32).abs()
    keep = torch.ones_like(magnitudes, dtype=torch.bool) if keep is None else keep
    mean: Tensor = magnitudes.masked_fill(~keep, 0.0).sum(1) / keep.sum(1).clamp_min(1)
    return mean.mul(2 / grid.high**0.5).clamp_(min=EPS)


@torch.no_grad()
def counted_step(histogram: Histogram, grid: Grid) -> Tensor:
    """Return what ``initial_step`` does, of values that were counted in bins."""
    counts = histogram.counts.to(torch.float32)
    mean: Tensor = (histogram.centers().abs() * counts).sum(1) / counts.sum(1).clamp_min(1)
    return mean.mul(2 / grid.high**0.5).clamp_(min=EPS)


@torch.no_grad()
def counted_step_and_offset(
    histogram: Histogram, limits: Range, grid: Grid, *, num_rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """Return the first step and offset of LSQ+: those with which rounding changes the values little.

    For given integers the best step and offset are a regression line, and for these the best integers the nearest
    ones: both are found in turns, from the range of the values and from the one of ``clipping.mse_range``. No turn
    makes the squared error larger; the better end wins.

    Source: the objective of Bhalgat et al. 2020, arXiv:2004.09576, section 3 (initialization by least squares), which
    minimizes it by gradient descent.

    Args:
        histogram: Activations of the first batch, counted in bins.
        limits: Least and largest value of each block.
        grid: The format; its ends count, the offset takes the place of its zero point.
        num_rounds: Turns.

    Returns:
        Step, at least ``EPS``, and offset, float32 [blocks] each.
    """
    return _least_squares(histogram.centers(), histogram.counts.to(torch.float32), limits, grid, num_rounds)


def gradient_scale(numel: int, grid: Grid) -> float:
    """Return g = 1 / sqrt(N Q_P), which makes the step's updates as large, relative to it, as the weights'.

    Source: Esser et al. 2020, arXiv:1902.08153, section 2.2.

    Args:
        numel: N: values that share the step. Of a weight, its numel (a channel's, per channel); of an activation, its
            features without batch and sequence.
        grid: The format; Q_P is its highest integer.

    Raises:
        ConfigError: If there are no values.
    """
    if numel < 1:
        raise ConfigError(f"gradient_scale: got numel={numel}; allowed: an int >= 1, the values that share the step.")
    return float((numel * grid.high) ** -0.5)


def learned_step(
    x: Tensor, grid: Grid, step: Tensor, offset: Tensor | None = None, *, gradient_scale: float = 1.0
) -> Tensor:
    """Return round(clamp((x - b) / s, low, high)) * s + b, differentiable with respect to x, s and b.

    Gradients, with v = (x - b) / s: for x, 1 where low < v < high and 0 elsewhere; for s, round(v) - v inside and the
    end that v was clipped to elsewhere; for b, 0 inside and 1 elsewhere.

    Source: LSQ, Esser et al. 2020, arXiv:1902.08153, equations 1 to 3 and 5; LSQ+, Bhalgat et al. 2020,
    arXiv:2004.09576, section 3; here both learned parameters get the factor g. A learned offset need not be a multiple
    of the step, so zero may be off the grid; an integer kernel needs b rounded to one, at the end of training.

    Args:
        x: Values, any shape.
        grid: The format; its ends count, its zero point does not: the offset takes its place.
        step: s > 0, float32, broadcastable to ``x``, with at least one dimension.
        offset: b, likewise; None = 0 (LSQ).
        gradient_scale: What the gradients of s and b are multiplied by, see ``gradient_scale``.

    Returns:
        Values on the grid, same shape and dtype as ``x``.
    """
    result: Tensor = _LearnedStep.apply(x, step, offset, grid.low, grid.high, gradient_scale)  # type: ignore[no-untyped-call]
    return result


def _least_squares(
    values: Tensor, weights: Tensor, limits: Range, grid: Grid, num_rounds: int
) -> tuple[Tensor, Tensor]:
    low, high = limits
    low, high = low.masked_fill(low > high, 0.0), high.masked_fill(low > high, 0.0)
    affine = Grid(num_bits=grid.num_bits, signed=grid.signed, symmetric=False)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in ((low, high), mse_range(values, weights, affine, (low, high))):
        step = ((start[1] - start[0]) / (grid.high - grid.low)).clamp_(min=EPS)[:, None]
        offset = start[0][:, None] - grid.low * step
        for _ in range(num_rounds):
            step, offset = _regression(values, weights, _steps(values, step, offset).round_(), grid, step)
        error = ((learned_step(values, grid, step, offset) - values).square_() * weights).sum(1, keepdim=True)
        if best is not None:
            better = error < best[0]
            error, step, offset = (torch.where(better, *pair) for pair in zip((error, step, offset), best, strict=True))
        best = (error, step, offset)
    return step.squeeze(1), offset.squeeze(1)


def _steps(x: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    # Multiplied as in numerics that are exported, see ``hf_compress.quantization.fake``.
    return (x if offset is None else x - offset).mul(1.0 / step)


def _regression(values: Tensor, weights: Tensor, steps: Tensor, grid: Grid, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step and offset, [blocks, 1] each, of the line through the values over their integers."""
    integers = steps.clamp_(grid.low, grid.high)
    total = weights.sum(1, keepdim=True).clamp_min(1)
    means = [(each * weights).sum(1, keepdim=True) / total for each in (integers, values)]
    centered = (integers - means[0]) * weights
    spread = (centered * integers).sum(1, keepdim=True)
    step = torch.where(spread > 0, (centered * values).sum(1, keepdim=True) / spread, previous).clamp_min(EPS)
    return step, means[1] - means[0] * step


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.ends, ctx.gradient_scale = (low, high), gradient_scale
        values = _steps(x, step, offset).round_().clamp_(low, high).mul_(step)
        return (values if offset is None else values.add_(offset)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, step, offset = ctx.saved_tensors
        low, high = ctx.ends
        steps = _steps(x, step, offset)
        inside = (steps > low) & (steps < high)
        rounded = steps.round().clamp_(low, high)
        slope = torch.where(inside, rounded - steps, rounded)
        for_step = (gradient * slope).sum_to_size(step.shape) * ctx.gradient_scale
        for_offset = None
        if offset is not None:
            outside = (gradient * ~inside).to(offset.dtype)
            for_offset = outside.sum_to_size(offset.shape) * ctx.gradient_scale
        return gradient * inside, for_step, for_offset, None, None, None
