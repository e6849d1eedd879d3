"""Histograms that grow with what they see and do not depend on the order in which they see it.

The range of a block is [-2^e, 2^e): where a larger value comes, e grows, and bins join in twos, fours, ... A value's
bin in the wider range is known exactly from its bin in the narrower one, so batches and ranks may come in any order.
Nothing waits for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST_EXPONENT = -100
"""Of the range of a block that has seen nothing but zeros; values below 2^-100 count as zeros."""


class Histogram(NamedTuple):
    """Counts of values in bins of equal width, one row for each block."""

    counts: Tensor
    """int64 [blocks, bins]; bins is a power of two."""

    exponent: Tensor
    """int32 [blocks]: e, where the bins divide [-2^e, 2^e)."""

    def width(self) -> Tensor:
        """Return the width of a bin, float32 [blocks, 1]."""
        return _power_of_two(self.exponent + 1 - _log2(self.counts.shape[1]))[:, None]

    def centers(self) -> Tensor:
        """Return the middle of each bin, float32 [blocks, bins]."""
        bins = self.counts.shape[1]
        indices = torch.arange(-(bins // 2), bins // 2, dtype=torch.float32, device=self.counts.device)
        return (indices + 0.5) * self.width()

    def magnitudes(self) -> Tensor:
        """Return the counts of absolute values, int64 [blocks, bins / 2]; the bins divide [0, 2^e)."""
        half = self.counts.shape[1] // 2
        return self.counts[:, half:] + self.counts[:, :half].flip(1)


def histogram_of(blocks: Tensor, keep: Tensor | None, num_bins: int) -> Histogram:
    """Count values.

    Args:
        blocks: Values, [blocks, values]; those that are not finite are left out.
        keep: Bool, same shape: False = leave out.
        num_bins: A power of two.
    """
    blocks = blocks.detach().to(torch.float32)
    counted = torch.isfinite(blocks) if keep is None else keep & torch.isfinite(blocks)
    blocks = blocks.masked_fill(~counted, 0.0)
    # frexp gives |x| = m * 2^e with m in [0.5, 1): the smallest e with |x| < 2^e.
    largest = blocks.abs().amax(1)
    exponent = torch.frexp(largest).exponent.to(torch.int32).masked_fill(largest == 0, LOWEST_EXPONENT)
    exponent = exponent.clamp_min(LOWEST_EXPONENT)
    half = num_bins // 2
    indices = (blocks * _power_of_two(_log2(half) - exponent)[:, None]).floor_().to(torch.int64) + half
    counts = torch.zeros(len(blocks), num_bins, dtype=torch.int64, device=blocks.device)
    return Histogram(counts.scatter_add_(1, indices, counted.to(torch.int64)), exponent)


def add(first: Histogram, second: Histogram) -> Histogram:
    """Return the histogram of the values of both."""
    exponent = torch.maximum(first.exponent, second.exponent)
    return Histogram(_widen(first, exponent) + _widen(second, exponent), exponent)


def add_over_ranks(histogram: Histogram, reduce: Callable[[Tensor, str], Tensor]) -> Histogram:
    """Return the histogram of the values of all ranks; ``reduce(tensor, "max" or "sum")`` exchanges."""
    exponent = reduce(histogram.exponent, "max")
    return Histogram(reduce(_widen(histogram, exponent), "sum"), exponent)


def _widen(histogram: Histogram, exponent: Tensor) -> Tensor:
    """Return the counts over [-2^exponent, 2^exponent), which is not narrower."""
    counts = histogram.counts
    half = counts.shape[1] // 2
    shift = (exponent - histogram.exponent).clamp_(0, 62).to(torch.int64)
    indices = torch.arange(-half, half, device=counts.device)[None] >> shift[:, None]  # rounds down
    return torch.zeros_like(counts).scatter_add_(1, indices + half, counts)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent exactly, float32; exponents from -126 to 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _log2(power: int) -> int:
    return power.bit_length() - 1
