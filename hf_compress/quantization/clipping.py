"""Ranges narrower than the extremes: a few large values are clipped, so that all others are rounded more finely.

Blocks of values come with a count for each value: 1 or 0 for a tensor's own values, more for the bins of a histogram.
Nothing waits for the device.
"""

import torch
from torch import Tensor

from hf_compress.quantization.fake import fake_quantize
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.histogram import Histogram

Range = tuple[Tensor, Tensor]
"""Low and high, [blocks] each."""

FAINT = 1e-4
"""Counts of a bin that would make a KL divergence infinite; what MXNet's and ONNX Runtime's calibration smooth with."""


def extremes(blocks: Tensor, keep: Tensor | None = None) -> Range:
    """Return the least and the largest value of each block, in its dtype.

    Args:
        blocks: [blocks, values].
        keep: Bool, same shape: False = leave out.

    Returns:
        [blocks] each; inf and -inf where nothing is kept.
    """
    blocks = blocks.detach()
    if keep is None:
        return blocks.amin(1), blocks.amax(1)
    return blocks.masked_fill(~keep, torch.inf).amin(1), blocks.masked_fill(~keep, -torch.inf).amax(1)


@torch.no_grad()
def mse_range(values: Tensor, counts: Tensor | None, grid: Grid, limits: Range, *, num_candidates: int = 100) -> Range:
    """Return the range in ``limits`` under which rounding changes the values least, in the mean of squares.

    Shares 1 / n, 2 / n, ..., 1 of the limits are tried: both ends at once; for affine grids then the lower end alone,
    and the upper end alone.

    Source: the search of LSQ+, Bhalgat et al. 2020, arXiv:2004.09576, section 3, on a
    fixed grid of candidates; the same objective as Banner et al. 2019, arXiv:1810.05723.

    Args:
        values: [blocks, values].
        counts: How often each occurs, same shape; None = once.
        grid: The format.
        limits: Low and high of the values, [blocks] each.
        num_candidates: n.

    Returns:
        Low and high, float32 [blocks]; for symmetric grids -high and high (0 and high if unsigned).
    """
    values = values.detach().to(torch.float32)
    low, high = limits[0].to(torch.float32).clamp_max(0), limits[1].to(torch.float32).clamp_min(0)
    if grid.symmetric:
        high = torch.maximum(-low, high) if grid.signed else high
        low = -high if grid.signed else torch.zeros_like(high)
    best = (low, high)
    least = _squared_error(values, counts, grid, best)
    for moved in [(True, True)] if grid.symmetric else [(True, True), (True, False), (False, True)]:
        start = best if moved != (True, True) else (low, high)
        full = (low if moved[0] else start[0], high if moved[1] else start[1])
        for k in range(1, num_candidates):
            share = k / num_candidates
            tried = (full[0] * share if moved[0] else full[0], full[1] * share if moved[1] else full[1])
            error = _squared_error(values, counts, grid, tried)
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
    return best


def percentile_range(histogram: Histogram, grid: Grid, limits: Range, *, percentile: float) -> Range:
    """Return the range that leaves out the largest values.

    Args:
        histogram: Of the values.
        grid: Symmetric and signed: the percentile of absolute values is the upper end and minus the lower one. Else:
            the percentile and 100 minus it.
        limits: Low and high of the values, [blocks] each; the result stays inside.
        percentile: In (50, 100]; ends lie up to one bin beyond the exact percentile, never short of it.

    Returns:
        Low and high, float32 [blocks].
    """
    low, high = limits[0].to(torch.float32), limits[1].to(torch.float32)
    width = histogram.width().squeeze(1)
    if grid.symmetric and grid.signed:
        end = _bins_below(histogram.magnitudes(), percentile) * width
        end = torch.minimum(end, torch.maximum(-low, high))
        return -end, end
    half = histogram.counts.shape[1] // 2
    upper = (_bins_below(histogram.counts, percentile) - half) * width
    lower = -(_bins_below(histogram.counts.flip(1), percentile) - half) * width
    return torch.maximum(lower, low), torch.minimum(upper, high)


def entropy_range(histogram: Histogram, grid: Grid, limits: Range, *, num_candidates: int = 128) -> Range:
    """Return the range whose quantized distribution tells most of the original one: least KL divergence.

    For thresholds t, the distribution P of absolute values, those beyond t counted as t, is compared with Q: the values
    below t on ``grid.high + 1`` levels, each level's count spread evenly over its bins that are not empty. Where
    the bin next to t is empty, Q has ``FAINT`` counts there, or no threshold in a gap before an outlier would do.

    Source: Migacz 2017, "8-bit inference with TensorRT" (GTC), entropy calibration; it tries every bin as a
    threshold, here ``num_candidates`` of them are tried.

    Args:
        histogram: Of the values.
        grid: The format. Affine grids get the threshold on the side where values reach it.
        limits: Low and high of the values, [blocks] each; the result stays inside.
        num_candidates: Thresholds, evenly spaced over the histogram.

    Returns:
        Low and high, float32 [blocks].
    """
    low, high = limits[0].to(torch.float32), limits[1].to(torch.float32)
    counts = histogram.magnitudes().to(torch.float64)
    levels = min(grid.high + 1, counts.shape[1])
    best = torch.full((len(counts),), counts.shape[1], device=counts.device)
    least = torch.full((len(counts),), torch.inf, dtype=torch.float64, device=counts.device)
    for k in range(num_candidates + 1):
        kept = levels + (counts.shape[1] - levels) * k // num_candidates
        divergence = _divergence(counts, kept, levels)
        better = divergence < least
        least = torch.where(better, divergence, least)
        best = best.masked_fill(better, kept)
    end = best * histogram.width().squeeze(1)
    if grid.symmetric and grid.signed:
        end = torch.minimum(end, torch.maximum(-low, high))
        return -end, end
    return torch.maximum(low, -end), torch.minimum(high, end)


def _squared_error(values: Tensor, counts: Tensor | None, grid: Grid, tried: Range) -> Tensor:
    scale, zero_point = grid.parameters(*tried)
    zero_point = None if zero_point is None else zero_point[:, None]
    errors = (fake_quantize(values, grid, scale[:, None], zero_point, covered=True) - values).square_()
    return (errors if counts is None else errors * counts).sum(1, dtype=torch.float64)


def _bins_below(counts: Tensor, percentile: float) -> Tensor:
    """Return how many bins it takes, from the first, to hold a percentage of all counts, [blocks]."""
    total = counts.cumsum(1).to(torch.float64)
    needed = total[:, -1:] * (percentile / 100)
    return (total < needed).sum(1) + 1


def _divergence(counts: Tensor, kept: int, levels: int) -> Tensor:
    """Return KL(P || Q) for the first ``kept`` bins, [blocks]."""
    inside = counts[:, :kept]
    original = inside.clone()
    original[:, -1] += counts[:, kept:].sum(1)
    filled = (inside > 0).to(counts.dtype)
    level = (torch.arange(kept, device=counts.device) * levels // kept).expand_as(inside)
    empty = counts.new_zeros(len(counts), levels)
    mass, bins = empty.scatter_add(1, level, inside), empty.scatter_add(1, level, filled)
    quantized = (mass / bins.clamp_min(1)).gather(1, level) * filled
    quantized = torch.where((original > 0) & (quantized == 0), FAINT, quantized)
    p = original / original.sum(1, keepdim=True).clamp_min(1)
    q = quantized / quantized.sum(1, keepdim=True).clamp_min(1)
    return torch.where(original > 0, p * (p / q).log(), 0.0).sum(1)
