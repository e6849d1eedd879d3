"""Quantization schemes: which numbers of a layer become integers, with which scales."""

from typing import Protocol

from torch import Tensor

from hf_compress.quantization.numerics import fake_quantize, symmetric_scale
from hf_compress.registry import schemes


class Scheme(Protocol):
    """How the weight [out_features, in_features] and the input [..., in_features] of a layer are quantized."""

    def weight_scale(self, weight: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the weight's scales.

        Args:
            weight: [out_features, in_features].
            factors: What the inputs are multiplied by, broadcastable to the weight; 0 = the channel is removed and
                must not influence the scale, or the layer that really lacks it would get another one.
        """
        ...

    def input_scale(self, x: Tensor) -> Tensor:
        """Return the input's scales."""
        ...

    def fake_quantize_weight(self, weight: Tensor, factors: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """Return the weight on its grid, differentiable; ``scale`` is the weight's, if it is known already."""
        ...

    def fake_quantize_input(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the input on its grid, differentiable; ``scale`` is the input's, if it is known already."""
        ...


@schemes.register("int8_dynamic")
class Int8Dynamic:
    """Symmetric int8 weights per output channel, symmetric int8 inputs per token, scales computed at each call.

    The numbers of torchao's ``Int8DynamicActivationInt8WeightConfig``, see ``hf_compress.quantization.numerics``.
    """

    def weight_scale(self, weight: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return one scale per output channel, float32 [out_features, 1]."""
        weight = weight.detach()
        if factors is not None:
            weight = weight.masked_fill(factors == 0, 0.0)
        return symmetric_scale(weight)

    def input_scale(self, x: Tensor) -> Tensor:
        """Return one scale per token (row of the last dimension), float32 [..., 1]."""
        return symmetric_scale(x.detach())

    def fake_quantize_weight(self, weight: Tensor, factors: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """Return the weight on its int8 grid."""
        scale = self.weight_scale(weight, factors) if scale is None else scale
        # Only removed channels can exceed the range, and their gradient is zero already: their input is zero.
        return fake_quantize(weight, scale, covered=True)

    def fake_quantize_input(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the input on its int8 grid."""
        return fake_quantize(x, self.input_scale(x) if scale is None else scale, covered=True)
