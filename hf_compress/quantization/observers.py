"""Observers: from the tensors that pass, the range that a grid has to cover.

What an observer knows is in ``state``, a few tensors that go into a checkpoint as they are. Nothing waits for the
device. Callers decide what an update is: values of one step may first be joined in a ``MinMax``, over micro-batches
and ranks, whose range then goes to ``Ema.update``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.errors import ConfigError, TargetError
from hf_compress.quantization.clipping import Range, entropy_range, extremes, mse_range, percentile_range
from hf_compress.quantization.granularity import PER_TENSOR, Granularity
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.histogram import Histogram, add, add_over_ranks, histogram_of
from hf_compress.registry import observers

Reduce = Callable[[Tensor, str], Tensor]
"""``reduce(tensor, operation)`` returns the elementwise ``"min"``, ``"max"`` or ``"sum"`` over all ranks."""


class Observer(ABC):
    """Collects what is needed to choose a range for each block of a granularity.

    Args:
        grid: The format that the range is for.
        granularity: Which values share a range. Not per token: those ranges are computed at every call.
    """

    names: ClassVar[frozenset[str]]
    """Of the tensors in ``state``."""

    while_evaluating = False
    """Whether it also watches layers in eval mode, as a collector of a quantizer."""

    def __init__(self, grid: Grid, granularity: Granularity = PER_TENSOR) -> None:
        if granularity.kind == "token":
            raise ConfigError(
                f"{type(self).__name__}: got granularity 'token'; allowed: 'tensor', 'channel', 'group'. Tokens have "
                "no range that lasts: compute it from each tensor with clipping.extremes."
            )
        self.grid = grid
        """The format that the range is for."""

        self.granularity = granularity
        """Which values share a range."""

        self.state: dict[str, Tensor] = {}
        """Empty until something was observed; then a tensor for each of ``names``, first dimension [blocks]."""

    @torch.no_grad()
    def observe(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Take the values of a tensor in; one update.

        Args:
            x: A weight or an activation.
            keep: Bool, broadcastable to ``x``: False = leave out, e.g. ``factors != 0`` for the removed channels of a
                weight, or the attention mask for padding.

        Raises:
            TargetError: If the shape does not suit the granularity or what was observed before.
        """
        blocks = self.granularity.blocks(x)
        self.state = {name: tensor.to(x.device) for name, tensor in self.state.items()}  # a checkpoint's are on the CPU
        if self.state and len(blocks) != len(next(iter(self.state.values()))):
            raise TargetError(
                f"{type(self).__name__}: got {len(blocks)} blocks (shape {tuple(x.shape)}, per "
                f"{self.granularity.kind}), and {len(next(iter(self.state.values())))} before. Use one observer for "
                "each tensor."
            )
        if blocks.numel():
            self._take(blocks, None if keep is None else self.granularity.blocks(keep.expand_as(x)))

    def range(self) -> Range:
        """Return the range for each block; 0 to 0 for a block of which nothing was kept.

        Returns:
            Low and high, [blocks] each, for ``Grid.parameters`` and ``Granularity.spread``. Not finite where a value
            that was observed is not.

        Raises:
            TargetError: If nothing was observed.
        """
        self._check_observed("range()")
        return self._choose(_filled(self.state["low"], self.state["high"]))

    def merge(self, reduce: Reduce) -> None:
        """Join what all ranks observed; afterwards all have the same state.

        Every rank must call it, having observed something. Do not observe on and merge again: counts would count
        twice.

        Args:
            reduce: Exchanges a tensor with the other ranks.

        Raises:
            TargetError: If nothing was observed on this rank.
        """
        self._check_observed("merge()")
        self._merge(reduce)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved ``state``; an empty one starts anew.

        Raises:
            TargetError: If it is the state of another kind of observer.
        """
        if state and set(state) != self.names:
            raise TargetError(
                f"{type(self).__name__}: got a state with {sorted(state)}; allowed: {sorted(self.names)}. Resume with "
                "the observer that the checkpoint was made with."
            )
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}

    @abstractmethod
    def _take(self, blocks: Tensor, keep: Tensor | None) -> None:
        """Update the state with [blocks, values] and what to keep of them."""

    def _choose(self, limits: Range) -> Range:
        return limits

    def _merge(self, reduce: Reduce) -> None:
        self.state["low"] = reduce(self.state["low"], "min")
        self.state["high"] = reduce(self.state["high"], "max")

    def _check_observed(self, what: str) -> None:
        if not self.state:
            raise TargetError(
                f"{type(self).__name__}.{what}: nothing was observed. Did calibration reach this layer? Give more "
                "data, or exclude the layer."
            )

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if self.state:
            low, high = torch.minimum(self.state["low"], low), torch.maximum(self.state["high"], high)
        self.state["low"], self.state["high"] = low, high


@observers.register("min_max")
class MinMax(Observer):
    """The least and the largest value ever, in the dtype of the tensors."""

    names = frozenset({"low", "high"})

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Take extremes in, [blocks] each; a block with low > high had no values and stays."""
        self._widen(low, high)

    def _take(self, blocks: Tensor, keep: Tensor | None) -> None:
        self.update(*extremes(blocks, keep))


@observers.register("ema")
class Ema(Observer):
    """Exponential moving average of each update's least and largest value; the first update counts in full.

    Ranks are joined by the mean.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1.

    Args:
        grid: The format that the range is for.
        granularity: Which values share a range.
        momentum: Share of the old average, in [0, 1).
    """

    names = frozenset({"low", "high", "seen"})

    def __init__(self, grid: Grid, granularity: Granularity = PER_TENSOR, *, momentum: float = 0.99) -> None:
        super().__init__(grid, granularity)
        _check("Ema.momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)")
        self.momentum = momentum

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Take in the extremes of one step, [blocks] each; a block with low > high had no values and stays."""
        empty = low > high
        seen = (~empty).to(torch.float32)
        low, high = (end.to(torch.float32).masked_fill(empty, 0.0) for end in (low, high))
        if self.state:
            share = torch.where(self.state["seen"] > 0, self.momentum, 0.0)
            share = torch.where(empty, 1.0, share)
            low = self.state["low"] * share + low * (1 - share)
            high = self.state["high"] * share + high * (1 - share)
            seen = torch.maximum(self.state["seen"], seen)
        self.state = {"low": low, "high": high, "seen": seen}

    def _take(self, blocks: Tensor, keep: Tensor | None) -> None:
        self.update(*extremes(blocks, keep))

    def _merge(self, reduce: Reduce) -> None:
        seen = reduce(self.state["seen"], "sum")
        for name in ("low", "high"):
            self.state[name] = reduce(self.state[name] * self.state["seen"], "sum") / seen.clamp_min(1)
        self.state["seen"] = seen.clamp_max(1)


class HistogramObserver(Observer):
    """Counts values in bins; what follows from the counts is up to subclasses.

    Ranks are joined exactly: the same state as if one rank had observed everything.

    Args:
        grid: The format that the range is for.
        granularity: Which values share a range.
        num_bins: Bins from -2^e to 2^e > max|x|, a power of two from 16 to 2^20. Memory: 8 bytes a bin and block.
    """

    names = frozenset({"low", "high", "counts", "exponent"})

    def __init__(self, grid: Grid, granularity: Granularity = PER_TENSOR, *, num_bins: int = 4096) -> None:
        super().__init__(grid, granularity)
        power = isinstance(num_bins, int) and 16 <= num_bins <= 1 << 20 and num_bins & (num_bins - 1) == 0
        _check(f"{type(self).__name__}.num_bins", num_bins, power, "a power of two from 16 to 2^20")
        self.num_bins = num_bins

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved ``state``; an empty one starts anew.

        Raises:
            TargetError: If it is the state of another kind of observer, or has another number of bins.
        """
        super().load(state)
        if state and state["counts"].shape[1] != self.num_bins:
            raise TargetError(
                f"{type(self).__name__}: got a state with {state['counts'].shape[1]} bins; allowed: {self.num_bins}. "
                "Resume with the num_bins that the checkpoint was made with."
            )

    def histogram(self) -> Histogram:
        """Return the counts."""
        self._check_observed("histogram()")
        return Histogram(self.state["counts"], self.state["exponent"])

    def _take(self, blocks: Tensor, keep: Tensor | None) -> None:
        counted = histogram_of(blocks, keep, self.num_bins)
        if self.state:
            counted = add(self.histogram(), counted)
        self._widen(*(end.to(torch.float32) for end in extremes(blocks, keep)))
        self.state.update(counted._asdict())

    def _merge(self, reduce: Reduce) -> None:
        super()._merge(reduce)
        self.state.update(add_over_ranks(self.histogram(), reduce)._asdict())


@observers.register("percentile")
class Percentile(HistogramObserver):
    """Leaves out the largest values, see ``clipping.percentile_range``.

    Args:
        grid: The format that the range is for.
        granularity: Which values share a range.
        percentile: Percentage in (50, 100] of the values that lies below the upper end.
        num_bins: Of the histogram.
    """

    def __init__(
        self, grid: Grid, granularity: Granularity = PER_TENSOR, *, percentile: float = 99.99, num_bins: int = 4096
    ) -> None:
        super().__init__(grid, granularity, num_bins=num_bins)
        _check("Percentile.percentile", percentile, 50 < percentile <= 100, "a number in (50, 100]")
        self.percentile = percentile

    def _choose(self, limits: Range) -> Range:
        return _finite(percentile_range(self.histogram(), self.grid, limits, percentile=self.percentile), limits)


class _Search(HistogramObserver):
    def __init__(
        self, grid: Grid, granularity: Granularity = PER_TENSOR, *, num_candidates: int = 100, num_bins: int = 4096
    ) -> None:
        super().__init__(grid, granularity, num_bins=num_bins)
        _check(f"{type(self).__name__}.num_candidates", num_candidates, num_candidates >= 1, "an int >= 1")
        self.num_candidates = num_candidates


@observers.register("mse")
class Mse(_Search):
    """Minimizes the squared rounding error over the histogram, see ``clipping.mse_range``.

    Args:
        grid: The format that the range is for.
        granularity: Which values share a range.
        num_candidates: Ranges that are tried.
        num_bins: Of the histogram.
    """

    def _choose(self, limits: Range) -> Range:
        histogram = self.histogram()
        centers, counts = histogram.centers(), histogram.counts
        return _finite(mse_range(centers, counts, self.grid, limits, num_candidates=self.num_candidates), limits)


@observers.register("entropy")
class Entropy(_Search):
    """Minimizes the KL divergence between the distributions before and after, see ``clipping.entropy_range``.

    Args:
        grid: The format that the range is for.
        granularity: Which values share a range.
        num_candidates: Thresholds that are tried.
        num_bins: Of the histogram.
    """

    def _choose(self, limits: Range) -> Range:
        return _finite(entropy_range(self.histogram(), self.grid, limits, num_candidates=self.num_candidates), limits)


def _filled(low: Tensor, high: Tensor) -> Range:
    empty = low > high  # False for NaN, which stays
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _finite(chosen: Range, limits: Range) -> Range:
    """Return NaN where a limit is not finite: the histogram has left such values out in silence."""
    broken = ~(torch.isfinite(limits[0]) & torch.isfinite(limits[1]))
    return chosen[0].masked_fill(broken, torch.nan), chosen[1].masked_fill(broken, torch.nan)


def _check(name: str, given: object, right: bool, allowed: str) -> None:
    if not right:
        raise ConfigError(f"{name}: got {given!r}; allowed: {allowed}.")
