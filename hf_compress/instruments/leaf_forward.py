"""What a leaf module computes while something is attached to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.instruments.adapters import base_layer, effective_weight
from hf_compress.instruments.attachment import Attachment
from hf_compress.instruments.leaf import LEAF_KINDS, LeafKind
from hf_compress.instruments.remake import Changes, remade_linear
from hf_compress.instruments.removed import removed_positions
from hf_compress.quantization.quantizers import Prepared, Quantizer


def leaf_forward(self: nn.Module, attachment: Attachment, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a leaf module, with what is attached to it."""
    if self.training:
        for record in attachment.recorders:
            record(x.detach())
    y = _computed(self, attachment, x, *args, **kwargs)
    removed = _removed_outputs(self, y) if attachment.output_quantizers else None
    for quantizer in attachment.output_quantizers:
        y = quantized(self, quantizer, y, removed, {}, "y")
    return y


def _removed_outputs(self: nn.Module, y: Tensor) -> Tensor | None:
    """Return which channels of the output are gone, for whoever reads it, broadcastable to it."""
    layer: Any = base_layer(self)
    kind = next(kind for base, kind in LEAF_KINDS.items() if isinstance(layer, base))
    out_dim = 1 if kind.weight_in_dim == 0 else 0
    told = removed_positions(layer, "weight", layer.weight.dim(), out_dim)
    return None if told is None else _broadcast(told.flatten(), y.dim(), kind.channel_dim)


def _computed(self: nn.Module, attachment: Attachment, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a leaf module with changed input and weight."""
    layer: Any = base_layer(self)
    kind = next(kind for base, kind in LEAF_KINDS.items() if isinstance(layer, base))
    # Autocast casts a weight once, however often it is used, and sums its gradients in the lower precision; a weight
    # that is not changed has to stay the one that is cast.
    autocast = torch.is_autocast_enabled(x.device.type)
    plain = layer is self and kind.is_linear and not (autocast and not attachment.changes_weight())
    fold = plain and attachment.input_quantizer is None and x.numel() >= layer.weight.numel()
    change_x, change_weight = changes = _changes(self, attachment, kind, x, layer.weight, fold)
    if layer is not self and not attachment.changes_weight():
        return attachment.base.forward(self, change_x(x), *args, **kwargs)
    weight = effective_weight(self)
    compute = partial(kind.compute, layer)
    # Autograd keeps an adapter's merged weight anyway; compilers decide themselves what to keep.
    if not plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(change_x(x), change_weight(weight), layer.bias)
    guards = () if attachment.weight_mask is None else (attachment.weight_mask.tensor(x.device),)
    return remade_linear(compute, (x, weight, layer.bias), changes, kind.weight_in_dim, guards)


def _changes(self: nn.Module, attachment: Attachment, kind: LeafKind, x: Tensor, weight: Tensor, fold: bool) -> Changes:
    """Return what is done to input and weight, as it is now: the backward pass does it again.

    Args:
        self: The layer.
        attachment: What is attached to it.
        kind: How it computes.
        x: Its input.
        weight: Its weight.
        fold: Multiply the weight by the gates instead of the input. The products are the same, and it is cheaper
            where there are more tokens than outputs; but a quantizer of the input has to see removed channels as 0.
    """
    factors = attachment.factors()
    mask, for_inputs, for_weights = attachment.weight_mask, attachment.input_quantizer, attachment.weight_quantizer
    for_x = for_weight = None
    if factors is not None and fold:
        for_weight = _broadcast(factors.to(weight.dtype), weight.dim(), kind.weight_in_dim)
    elif factors is not None:
        for_x = _broadcast(factors.to(x.dtype), x.dim(), kind.channel_dim)
    removed_x = _removed_channels(for_inputs, factors, kind, x, weight)
    removed = _removed_weights(self, for_weights, factors, kind, weight.dim())
    prepared: dict[str, Prepared] = {}  # steps are small enough to be remembered

    def x_on_grid(x: Tensor) -> Tensor:
        return x if for_inputs is None else quantized(self, for_inputs, x, removed_x, prepared, "x")

    def weight_on_grid(weight: Tensor) -> Tensor:
        if for_weights is None:
            return weight
        return kind.oriented(quantized(self, for_weights, kind.oriented(weight), removed, prepared, "weight"))

    def change_x(x: Tensor) -> Tensor:
        return _gated(x, for_x, for_inputs, x_on_grid)

    def change_weight(weight: Tensor) -> Tensor:
        return _gated(weight if mask is None else mask(weight), for_weight, for_weights, weight_on_grid)

    return change_x, change_weight


def _gated(
    x: Tensor, factors: Tensor | None, quantizer: Quantizer | None, on_grid: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return a tensor gated and quantized: gated first, unless the quantizer would make something of zeros."""
    if factors is None:
        return on_grid(x)
    late = quantizer is not None and quantizer.enabled and not quantizer.ignores_zeros
    return on_grid(x) * factors if late else on_grid(x * factors)


def _removed_channels(
    quantizer: Quantizer | None, factors: Tensor | None, kind: LeafKind, x: Tensor, weight: Tensor
) -> Tensor | None:
    """Return which channels of the input are gone, where that matters: gates say so, or a weight that reads nothing.

    The second is what folded masks leave.
    """
    if quantizer is None or quantizer.ignores_zeros:
        return None
    gone = None if factors is None else factors.detach() == 0
    if weight.shape[kind.weight_in_dim] == x.shape[kind.channel_dim]:  # not so for convolutions in groups
        unread = (weight.detach() == 0).movedim(kind.weight_in_dim, 0).flatten(1).all(1)
        gone = unread if gone is None else gone | unread
    return None if gone is None else _broadcast(gone, x.dim(), kind.channel_dim)


def _removed_weights(
    self: nn.Module, quantizer: Quantizer | None, factors: Tensor | None, kind: LeafKind, num_dims: int
) -> Tensor | None:
    """Return which weights belong to units that are gone, [outputs, inputs...], broadcastable."""
    if quantizer is None:
        return None
    removed = None if factors is None else _broadcast(factors.detach() == 0, num_dims, kind.weight_in_dim)
    if quantizer.granularity.kind == "tensor":  # else an output that is gone has a step of its own
        told = removed_positions(base_layer(self), "weight", num_dims)
        removed = removed if told is None else told if removed is None else removed | told
    return None if removed is None else kind.oriented(removed)


def quantized(
    self: nn.Module, quantizer: Quantizer, x: Tensor, removed: Tensor | None, prepared: dict[str, Prepared], key: str
) -> Tensor:
    """Return a tensor on its grid; the first time in a forward pass, it is watched and its step remembered.

    Args:
        self: The module that it belongs to.
        quantizer: What acts.
        x: The tensor, weights as [outputs, inputs...].
        removed: See ``Quantizer.prepare``.
        prepared: What is remembered between calls.
        key: Of this tensor in ``prepared``.
    """
    is_weight = key == "weight"
    if is_weight:
        removed = quantizer.not_there(x, removed)
    first = key not in prepared
    collector = quantizer.collector
    if first and collector is not None and (self.training or collector.while_evaluating):
        collector.observe(x.detach() if removed is None else x.detach().masked_fill(removed, 0.0))
    if not quantizer.enabled:
        prepared[key] = ()
        return x
    if first:
        prepared[key] = quantizer.prepare(x.detach(), removed)
    values = quantizer.fake_quantize(x, removed, prepared[key])
    return quantizer.without_zeros(values, x) if is_weight else values


def _broadcast(factors: Tensor, num_dims: int, dim: int) -> Tensor:
    shape = [1] * num_dims
    shape[dim] = -1
    return factors.view(shape)
