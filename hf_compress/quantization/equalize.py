"""Changes of weights that leave the real-valued model as it is and make it easier to round.

Each function returns factors or a bias; who applies them knows the layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compress.errors import ConfigError


@torch.no_grad()
def smooth_factors(input_max: Tensor, weights: Sequence[Tensor], *, alpha: float = 0.5) -> Tensor:
    """Return what to divide the inputs of layers by, and to multiply the matching columns of their weights by.

    ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``: outliers move from the inputs to the weights.

    Source: SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, equation 4.

    Args:
        input_max: Largest absolute value of each input over calibration tokens, [inputs].
        weights: Of all layers that read this input, [outputs, inputs] each.
        alpha: In [0, 1]: 0 leaves the difficulty with the inputs, 1 moves all of it to the weights.

    Returns:
        Positive factors, float32 [inputs]; 1 for inputs that are always zero or never read.

    Raises:
        ConfigError: For another alpha, or without a weight.
    """
    if not 0 <= alpha <= 1 or not weights:
        raise ConfigError(
            f"smooth_factors: got alpha={alpha} and {len(weights)} weights; allowed: a number in [0, 1] and one weight "
            "or more."
        )
    inputs = input_max.to(torch.float32).abs()
    columns = torch.stack([weight.to(torch.float32).abs().amax(0) for weight in weights]).amax(0)
    factors = inputs.pow(alpha) / columns.pow(1 - alpha)
    return _one_where_not(factors, (inputs > 0) & (columns > 0))


@torch.no_grad()
def equalizing_factors(first: Tensor, second: Tensor) -> Tensor:
    """Return what to divide the rows of one weight and its bias by, and to multiply the columns of the next by.

    ``s_i = sqrt(r1_i r2_i) / r2_i`` with the ranges r = max|w| of row i and column i; afterwards both are
    sqrt(r1_i r2_i). Exact if what lies between is linear or ReLU, f(s x) = s f(x), not for GELU or SiLU.

    Source: cross-layer equalization, Nagel et al. 2019, arXiv:1906.04721, equation 11.

    Args:
        first: [units, inputs].
        second: [outputs, units].

    Returns:
        Positive factors, float32 [units]; 1 for units without a weight on one side.
    """
    r1 = first.to(torch.float32).abs().amax(1)
    r2 = second.to(torch.float32).abs().amax(0)
    return _one_where_not((r1 / r2).sqrt(), (r1 > 0) & (r2 > 0))


@torch.no_grad()
def corrected_bias(weight: Tensor, rounded: Tensor, mean_input: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the bias that takes back what rounding the weight adds to the mean output: b - (W^ - W) E[x].

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2.

    Args:
        weight: The weight W, [outputs, inputs].
        rounded: The weight on its grid, W^, same shape.
        mean_input: E[x] over calibration tokens, [inputs].
        bias: b, [outputs]; None = 0.

    Returns:
        [outputs], in the dtype of the bias, or of the weight.
    """
    shift = (rounded.double() - weight.double()) @ mean_input.double()
    dtype = weight.dtype if bias is None else bias.dtype
    corrected: Tensor = (-shift if bias is None else bias.double() - shift).to(dtype)
    return corrected


def _one_where_not(factors: Tensor, usable: Tensor) -> Tensor:
    return torch.where(usable, factors, 1.0)
