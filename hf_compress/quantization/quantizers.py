"""Quantizers: what puts one tensor of one layer on a grid whenever the layer runs.

The range is that of the tensor itself (``RangeQuantizer``), one that was observed (``ObservedQuantizer``), or learned
(``LearnedQuantizer``); those in ``own_grids`` have none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_compress.config.formats import TensorFormat
from hf_compress.errors import TargetError
from hf_compress.quantization.clipping import Range, extremes
from hf_compress.quantization.fake import fake_quantize
from hf_compress.quantization.granularity import PER_TENSOR, Granularity
from hf_compress.quantization.grid import EPS, Grid
from hf_compress.quantization.lsq import (
    counted_step,
    counted_step_and_offset,
    gradient_scale,
    initial_step,
    learned_step,
)
from hf_compress.quantization.observers import HistogramObserver, Observer
from hf_compress.registry import observers

Prepared = tuple[Tensor | None, ...]
"""What is worth remembering between the forward pass and the backward pass: steps and zero points."""


class Collector(Protocol):
    """Watches the tensors that come to a quantizer."""

    @property
    def while_evaluating(self) -> bool:
        """Whether it also watches layers in eval mode."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Return what is known; empty before the first tensor."""

    def observe(self, x: Tensor) -> None:
        """Take a tensor in."""


class Quantizer(ABC):
    """Puts a tensor on its grid.

    Weights come as [outputs, inputs...], whatever the layer stores.
    """

    grid: Grid | None = None
    """The integers that an export can store; None: it cannot."""

    granularity: Granularity = PER_TENSOR
    """Which values share a step."""

    @property
    def num_bits(self) -> int:
        """Return the bits of a value."""
        return 1 if self.grid is None else self.grid.num_bits

    enabled: bool = True
    """Whether ``fake_quantize`` is to be called; one that is not may still watch."""

    collector: Collector | None = None
    """What watches the tensors that come, while it is set."""

    format: TensorFormat | None = None
    """What it was made for."""

    method: str | None = None
    """Registry name of the method that made it."""

    ignores_zeros: bool = True
    """Whether zeros stay zeros and have no part in the range, so that what is removed may as well be zero."""

    def prepare(self, x: Tensor, removed: Tensor | None) -> Prepared:
        """Return what ``fake_quantize`` needs and is worth remembering.

        Args:
            x: The tensor.
            removed: Bool, broadcastable to it: True = belongs to a removed channel and must not count, or the layer
                that really lacks it would get another range. None: nothing is.
        """
        return ()

    @abstractmethod
    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return the tensor on its grid, differentiable.

        Args:
            x: The tensor.
            removed: See ``prepare``.
            prepared: What ``prepare`` returned for it.
        """

    def not_there(self, weight: Tensor, removed: Tensor | None = None) -> Tensor | None:
        """Return what must not count: what is removed, and zeros where they would count otherwise.

        Exact zeros are pruned weights, and units whose masks are written into the weights.
        """
        if self.ignores_zeros:
            return removed
        zeros = weight.detach() == 0
        return zeros if removed is None else zeros | removed

    def without_zeros(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return a weight's ``values`` on the grid with zeros where the weight is zero."""
        return values if self.ignores_zeros else values.masked_fill(weight.detach() == 0, 0.0)

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """Return a weight [outputs, inputs...] on its grid, as a layer without gates uses it."""
        removed = self.not_there(weight)
        return self.without_zeros(self.fake_quantize(weight, removed, self.prepare(weight, removed)), weight)

    def select(self, blocks: Tensor) -> None:  # noqa: B027 - most remember no steps
        """Keep the steps of some blocks alone, in this order, once the tensor has lost the others."""

    def parameters(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the steps, float32 [blocks], and the zero points, int32 [blocks] (None: 0).

        Args:
            x: The weight, for a quantizer whose range is that of the tensor.

        Raises:
            TargetError: If there are none.
        """
        raise TargetError(f"{type(self).__name__} has no integer grid, so only its values can be stored.")


class RangeQuantizer(Quantizer):
    """The range is that of the tensor itself, at every call.

    Args:
        grid: The format.
        granularity: What shares a step.
        observer: How the range is chosen, by registry name.
        options: Arguments of the observer.
    """

    def __init__(
        self, grid: Grid, granularity: Granularity, observer: str = "min_max", options: Mapping[str, Any] | None = None
    ) -> None:
        self.grid: Grid = grid
        self.granularity = granularity
        self.ignores_zeros = self._covers = observer == "min_max"
        self.observer, self.options = observer, dict(options or {})
        self._fixed: tuple[Tensor, Tensor | None] | None = None
        self.is_own = True
        """Whether the steps are those of the tensor's range, and not what something else has chosen."""

    def fix(self, scale: Tensor, zero_point: Tensor | None, *, own: bool = False) -> None:
        """Set steps and zero points of a weight, [blocks] each: its range is not looked for at every call.

        Args:
            scale: The steps.
            zero_point: The zero points; None = 0.
            own: They are those of the weight's own range, so a weight that loses a part gets others.
        """
        self._fixed, self.is_own = (scale, zero_point), own
        self._covers, self.ignores_zeros = False, True

    @property
    def is_fixed(self) -> bool:
        """Return whether the steps are fixed."""
        return self._fixed is not None

    def release(self) -> None:
        """Let the tensor's own range count again."""
        self._fixed, self.is_own = None, True
        self.ignores_zeros = self._covers = self.observer == "min_max"

    def select(self, blocks: Tensor) -> None:
        """Keep the fixed steps of some blocks alone."""
        if self._fixed is not None and self.granularity.kind != "tensor":
            scale, zero_point = self._fixed
            here = blocks.to(scale.device)
            self._fixed = scale[here], None if zero_point is None else zero_point[here]

    @torch.no_grad()
    def range(self, x: Tensor, removed: Tensor | None = None) -> Range:
        """Return the low and high ends of the range of a tensor, [blocks] each, whatever is fixed."""
        if self.observer == "min_max":  # zero belongs to every range, so zeros do not count
            blocks = self.granularity.blocks(x if removed is None else x.masked_fill(removed, 0.0))
            if blocks.numel() == 0:
                blocks = x.new_zeros(len(blocks), 1)
            return extremes(blocks)
        observer: Observer = observers.get(self.observer)(self.grid, self.granularity, **self.options)
        observer.observe(x, None if removed is None else ~removed)
        return observer.range()

    @torch.no_grad()
    def parameters(self, x: Tensor | None = None, removed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return steps and zero points of a tensor, [blocks] each."""
        assert x is not None
        if self._fixed is not None:
            scale, zero_point = self._fixed
            return scale.to(x.device), None if zero_point is None else zero_point.to(x.device)
        return self.grid.parameters(*self.range(x, removed))

    def prepare(self, x: Tensor, removed: Tensor | None) -> Prepared:
        """Return step and zero point, laid out for ``Granularity.view``."""
        return _spread(self.granularity, self.parameters(x, removed), x)

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return the tensor on its grid; the gradient passes straight through within the range."""
        return _on_grid(x, self.grid, self.granularity, prepared, covered=self._covers)


class ObservedQuantizer(Quantizer):
    """One range for all calls, observed while training or calibrating.

    Args:
        grid: The format.
        observer: Chooses the range; whoever drives the quantizer feeds it.
    """

    def __init__(self, grid: Grid, observer: Observer) -> None:
        self.grid: Grid = grid
        self.observer = observer
        """Chooses the range."""

        self._known: tuple[Tensor, Tensor | None] | None = None
        self.limits: Range | None = None
        """Low and high ends of the range, [1] each, once it is known."""

    def settle(self) -> None:
        """Take the range over that the observer has now."""
        self.limits = self.observer.range()
        self._known = self.grid.parameters(*self.limits)

    def fix(self, scale: Tensor, zero_point: Tensor | None, limits: Range | None = None) -> None:
        """Set step and zero point, [1] each; what is observed later has no effect before ``settle``."""
        self._known = (scale, zero_point)
        self.limits = limits

    def parameters(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return step and zero point, [1] each.

        Raises:
            TargetError: If nothing was observed.
        """
        if self._known is None:
            raise TargetError(
                "quantization: a layer that is quantized has no range yet: nothing came through it while ranges were "
                "observed. Observe earlier or longer, calibrate with more data, or exclude the layer."
            )
        return self._known

    def prepare(self, x: Tensor, removed: Tensor | None) -> Prepared:
        """Return step and zero point; nothing before anything was settled, if it is watched.

        The first step's range is that of all its batches on all processes, which nobody knows before its end.
        """
        if self._known is None and self.collector is not None:
            return ()
        found = self.parameters()
        return _spread(self.granularity, tuple(None if each is None else each.to(x.device) for each in found), x)

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return the tensor on its grid; the gradient passes straight through within the range."""
        return _on_grid(x, self.grid, self.granularity, prepared) if prepared else x

    def state(self) -> dict[str, Tensor]:
        """Return what was observed."""
        return dict(self.observer.state)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was observed."""
        self.observer.load(state)
        self._known = self.limits = None
        if state:
            self.settle()


class LearnedQuantizer(Quantizer):
    """Step, and offset if the grid is affine, are trained: LSQ and LSQ+, see ``hf_compress.quantization.lsq``.

    Args:
        grid: The format.
        granularity: What shares a step.
        is_weight: Whether the tensor is a weight; of others, values of all tokens share a step.
    """

    def __init__(self, grid: Grid, granularity: Granularity, *, is_weight: bool) -> None:
        self.grid: Grid = grid
        self.granularity = granularity
        self._is_weight = is_weight
        self.learned: dict[str, Tensor] = {}
        """``"step"`` and ``"offset"``, float32 [blocks], once there is a first value; they get gradients."""
        self.is_snapped = False
        """Whether the numbers are those of a zero point now, as an export computes them."""

    def initialize(self, source: Tensor | HistogramObserver) -> None:
        """Choose the first values, as in the papers, for a weight or for what an observer has counted."""
        if not isinstance(source, HistogramObserver):
            self.load({"step": initial_step(self.granularity.blocks(source), self.grid)})
        elif self.grid.symmetric:
            self.load({"step": counted_step(source.histogram(), self.grid)})
        else:
            limits = source.state["low"], source.state["high"]
            step, offset = counted_step_and_offset(source.histogram(), limits, self.grid)
            self.load({"step": step, "offset": offset})

    def select(self, blocks: Tensor) -> None:
        """Keep the steps of some blocks alone."""
        if self.learned and self.granularity.kind != "tensor":
            trained = self.learned["step"].requires_grad
            self.load({name: each[blocks.to(each.device)] for name, each in self.learned.items()})
            for each in self.learned.values():
                each.requires_grad_(trained)

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep the steps positive, after the optimizer has moved them."""
        self.learned["step"].clamp_(min=EPS)

    @torch.no_grad()
    def snap(self) -> None:
        """Put zero on the grid, as integers need it: the offset becomes a multiple of the step."""
        if "offset" in self.learned:
            scale, zero_point = self.parameters()
            assert zero_point is not None
            self.learned["offset"].copy_(-zero_point * scale)
            self.is_snapped = True

    @torch.no_grad()
    def parameters(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return steps and zero points, [blocks] each.

        Raises:
            TargetError: If there are no first values yet.
        """
        self._check()
        step, offset = self.learned["step"].detach(), self.learned.get("offset")
        if offset is None:
            return step, None
        return step, torch.round(-offset / step).clamp_(self.grid.low, self.grid.high).to(torch.int32)

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return the tensor on its grid; gradients go to the tensor, the steps and the offsets."""
        if not self.learned and self.collector is not None:  # of the first step: nothing is learned yet
            found = _spread(self.granularity, self.grid.parameters(*extremes(self.granularity.blocks(x))), x)
            return _on_grid(x, self.grid, self.granularity, found, covered=True)
        self._check()
        if self.is_snapped:
            return _on_grid(x, self.grid, self.granularity, _spread(self.granularity, self.parameters(), x))
        per_step = x.numel() // len(self.learned["step"]) if self._is_weight else _features(x)
        scale = gradient_scale(max(per_step, 1), self.grid)

        def on_grid(viewed: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
            return learned_step(viewed, self.grid, step, offset, gradient_scale=scale)

        return self.granularity.apply(on_grid, x, self.learned["step"], self.learned.get("offset"))

    def state(self) -> dict[str, Tensor]:
        """Return step and offset."""
        return {name: each.detach() for name, each in self.learned.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from step and offset."""
        self.learned = {n: each.detach().to(torch.float32).clone().requires_grad_() for n, each in state.items()}
        self.is_snapped = False
        self.ignores_zeros = "offset" not in self.learned  # zero is not on the grid while an offset is trained

    def _check(self) -> None:
        if not self.learned:
            raise TargetError(
                "quantization: a layer has no learned step yet: nothing came through it in the first step after begin. "
                "Exclude the layer, or train on data that reaches it."
            )


def _features(x: Tensor) -> int:
    """Return the numbers of one token, or of one image."""
    return x[0].numel() if x.dim() == 4 else x.shape[-1]


def _spread(granularity: Granularity, found: tuple[Tensor | None, ...], x: Tensor) -> Prepared:
    return tuple(None if each is None else granularity.spread(each, x.shape) for each in found)


def _on_grid(x: Tensor, grid: Grid, granularity: Granularity, prepared: Prepared, *, covered: bool = False) -> Tensor:
    scale, zero_point = prepared
    assert scale is not None
    return granularity.restore(fake_quantize(granularity.view(x), grid, scale, zero_point, covered=covered))
