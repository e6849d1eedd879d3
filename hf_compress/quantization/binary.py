"""Binary weights and activations: the sign, scaled if wanted.

The latent weights stay real; training keeps them in [-1, 1] (``weight.clamp_(-1, 1)`` after each update), beyond which
they would get no gradient any more (Courbariaux et al. 2016, arXiv:1602.02830, section 1.4).
"""

from typing import Any

import torch
from torch import Tensor

from hf_compress.quantization.granularity import PER_TENSOR, Granularity


def binarize(
    x: Tensor, *, scaled: bool = False, granularity: Granularity = PER_TENSOR, keep: Tensor | None = None
) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere; the gradient passes straight through where |x| <= 1.

    Source: Courbariaux et al. 2016, arXiv:1602.02830, equations 1 and 4. Scaled: by the mean of |x|, the factor with
    the least squared error, of XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279, equation 6) or, with one bit,
    DoReFa-Net (arXiv:1606.06160, equation 7); the gradient then is that of the product, the mean's part included.

    Args:
        x: Any shape.
        scaled: Multiply by the mean of |x|.
        granularity: Over which values to take the mean.
        keep: Bool, broadcastable to ``x``: False = removed, must not influence the mean.

    Returns:
        Same shape and dtype as ``x``.

    Raises:
        TargetError: If the shape does not suit the granularity.
    """
    sign: Tensor = _Sign.apply(x)  # type: ignore[no-untyped-call]
    if not scaled:
        return sign
    magnitudes = x.abs()
    if keep is None:
        mean = granularity.blocks(magnitudes).mean(1)
    else:
        kept = granularity.blocks(keep.expand_as(x))
        mean = granularity.blocks(magnitudes.masked_fill(~keep, 0.0)).sum(1) / kept.sum(1).clamp_min(1)
    return granularity.restore(granularity.view(sign) * granularity.spread(mean, x.shape))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        (gradient,) = gradients
        masked: Tensor = gradient * inside
        return masked
