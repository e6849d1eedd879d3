"""DoReFa-Net: weights, activations and gradients of a few bits, without a range to observe or to learn.

Source: Zhou et al. 2016, arXiv:1606.06160.
"""

from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import ConfigError


def dorefa_weight(weight: Tensor, num_bits: int, keep: Tensor | None = None) -> Tensor:
    """Return 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, in [-1, 1].

    The maximum is over the whole weight. Values are odd multiples of 1 / (2^k - 1), so zero is not among them. The
    gradient goes through everything but the rounding.

    Source: Zhou et al. 2016, arXiv:1606.06160, equation 9. For one bit see ``binary.binarize``.

    Args:
        weight: Any shape.
        num_bits: k, 2 to 8.
        keep: Bool, broadcastable to ``weight``: False = removed, must not influence the maximum.

    Raises:
        ConfigError: For other numbers of bits.
    """
    levels = _levels(num_bits)
    bounded = weight.tanh()
    magnitudes = bounded.abs()
    if keep is not None:
        magnitudes = magnitudes.masked_fill(~keep, 0.0)
        bounded = bounded.masked_fill(~keep, 0.0)
    largest = magnitudes.max().clamp_min(torch.finfo(weight.dtype).tiny)
    return 2 * _round(bounded / (2 * largest) + 0.5, levels) - 1


def dorefa_activation(x: Tensor, num_bits: int) -> Tensor:
    """Return quantize_k(clip(x, 0, 1)); the gradient passes straight through on [0, 1] and is zero elsewhere.

    Source: Zhou et al. 2016, arXiv:1606.06160, section 2.4 (equation 11).

    Args:
        x: Any shape.
        num_bits: k, 2 to 8.

    Raises:
        ConfigError: For other numbers of bits.
    """
    return _round(x.clamp(0, 1), _levels(num_bits))


def dorefa_gradient(x: Tensor, num_bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Return ``x``; on the way back its gradient is rounded at random, without bias, to k bits.

    ``2 m (quantize_k(dr / (2 m) + 1/2 + N) - 1/2)`` with m = max|dr| of each example (first dimension) and noise N
    uniform within half a step.

    Source: Zhou et al. 2016, arXiv:1606.06160, equation 12.

    Args:
        x: The output of a layer, [batch, ...].
        num_bits: k, 2 to 8.
        generator: Of the noise, on the device of ``x``; None = torch's own.

    Raises:
        ConfigError: For other numbers of bits.
    """
    result: Tensor = _RoundGradient.apply(x, _levels(num_bits), generator)  # type: ignore[no-untyped-call]
    return result


def _levels(num_bits: int) -> int:
    whole = isinstance(num_bits, int) and not isinstance(num_bits, bool)
    if not whole or num_bits not in range(2, 9):
        raise ConfigError(f"dorefa: got num_bits={num_bits!r}; allowed: an int from 2 to 8. For 1 use binarize.")
    return int((1 << num_bits) - 1)


def _round(x: Tensor, levels: int) -> Tensor:
    result: Tensor = _Round.apply(x, levels)  # type: ignore[no-untyped-call]
    return result


class _Round(torch.autograd.Function):
    """quantize_k, equations 5 and 6: round((2^k - 1) r) / (2^k - 1) with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        return x.mul(levels).round_().div_(levels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, generator: torch.Generator | None) -> Tensor:
        ctx.levels, ctx.generator = levels, generator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        levels: int = ctx.levels
        largest = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True) if gradient.dim() > 1 else None
        largest = gradient.abs() if largest is None else largest
        largest = largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        noise = torch.rand(gradient.shape, generator=ctx.generator, dtype=gradient.dtype, device=gradient.device) - 0.5
        steps = ((gradient / (2 * largest) + 0.5) * levels + noise).round_().clamp_(0, levels)
        return 2 * largest * (steps / levels - 0.5), None, None
