"""Quantizers of parameters that are read by modules of any kind."""

from torch import Tensor, nn

from hf_compress.instruments.leaf_forward import quantized
from hf_compress.instruments.removed import removed_positions
from hf_compress.instruments.targets import as_matrix, from_matrix
from hf_compress.quantization.quantizers import Quantizer


class OnParameter:
    """Gives a module the values of one of its parameters on the grid, while it runs.

    Args:
        owner: The module.
        name: Of the parameter.
        quantizer: Acts on the parameter as [outputs, inputs].
    """

    def __init__(self, owner: nn.Module, name: str, quantizer: Quantizer) -> None:
        self.owner = owner
        self.name = name
        self.quantizer = quantizer

    def __call__(self, parameter: Tensor) -> Tensor:
        """Return the values."""
        removed = removed_positions(self.owner, self.name, parameter.dim())
        if removed is not None:
            removed = as_matrix(self.owner, removed.expand(parameter.shape))
        values = quantized(self.owner, self.quantizer, as_matrix(self.owner, parameter), removed, {}, "weight")
        return from_matrix(self.owner, values, parameter)
