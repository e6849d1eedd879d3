"""Learned step size quantization: the step, and an offset if wanted, are trained by gradient descent like a weight.

A step must stay positive: after each update of the optimizer, ``step.clamp_(min=EPS)``. Groups and channels: give
``Granularity.view(x)`` and a step laid out by ``Granularity.spread``.
"""

from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.quantization.clipping import extremes, mse_range
from hf_compress.quantization.grid import EPS, Grid


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
def initial_step_and_offset(
    blocks: Tensor, grid: Grid, keep: Tensor | None = None, *, num_candidates: int = 100
) -> tuple[Tensor, Tensor]:
    """Return the first step and offset of LSQ+: those with which rounding changes the values least.

    Source: Bhalgat et al. 2020, arXiv:2004.09576, section 3 (initialization by least squares); by
    search instead of gradient descent, see ``clipping.mse_range``.

    Args:
        blocks: Activations of the first batch, [blocks, values].
        grid: The format; taken as affine, whatever its ``symmetric`` says.
        keep: Bool, same shape: False = leave out.
        num_candidates: Ranges that are tried.

    Returns:
        Step, at least ``EPS``, and offset, float32 [blocks] each.
    """
    affine = Grid(num_bits=grid.num_bits, signed=grid.signed, symmetric=False)
    low, high = extremes(blocks.to(torch.float32), keep)
    empty = low > high
    limits = (low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0))
    values = blocks if keep is None else blocks.masked_fill(~keep, 0.0)  # 0 is on the grid and costs nothing
    step, zero_point = affine.parameters(*mse_range(values, None, affine, limits, num_candidates=num_candidates))
    assert zero_point is not None
    return step, -zero_point * step


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
    arXiv:2004.09576, section 3; here both learned parameters get the factor g. A learned offset need not be a multiple of
    the step, so zero may be off the grid; an integer kernel needs b rounded to one, at the end of training.

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


def _steps(x: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    # Multiplied as in numerics that are exported, see ``hf_compress.quantization.fake``.
    return (x if offset is None else x - offset).mul(1.0 / step)


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
