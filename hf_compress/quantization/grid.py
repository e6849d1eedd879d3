"""The grid of an integer format: its ends, and the step and zero point that let it cover a range of values.

``x^ = (q - z) * s`` with integers ``low <= q <= high``, step s and zero point z (Jacob et al. 2018, arXiv:1712.05877,
equation 1). Zero always lies on the grid: padding, removed channels and ReLU stay exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import ConfigError

EPS = torch.finfo(torch.float32).eps
"""Smallest step, for every dtype; a range of zeros would divide by zero."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Integers of a number of bits, and how real numbers are laid on them.

    Raises:
        ConfigError: For bits outside 2 to 8 (one bit is ``hf_compress.quantization.binary``), or ``restricted``
            without ``signed`` and ``symmetric``.
    """

    num_bits: int = 8
    """2 to 8."""

    signed: bool = True
    """Integers from -2^(bits - 1) on; False: from 0 on."""

    symmetric: bool = True
    """The zero point is 0. With ``signed=False`` negative values are then clipped to 0."""

    restricted: bool = False
    """Leave the lowest integer out: [-127, 127] instead of [-128, 127], for kernels that need q and -q. torchao's and
    compressed-tensors' int8 use the full range, ONNX Runtime's and TensorRT's int8 weights the restricted one."""

    def __post_init__(self) -> None:
        whole = isinstance(self.num_bits, int) and not isinstance(self.num_bits, bool)
        if not whole or self.num_bits not in range(2, 9):
            raise ConfigError(f"Grid.num_bits: got {self.num_bits!r}; allowed: an int from 2 to 8.")
        if self.restricted and not (self.signed and self.symmetric):
            raise ConfigError(
                f"Grid.restricted: got True with signed={self.signed} and symmetric={self.symmetric}; allowed: True "
                "only for signed symmetric grids, as others have no integer without its negative to leave out."
            )

    @property
    def low(self) -> int:
        """The lowest integer, e.g. -128."""
        return int(self.restricted) - (1 << (self.num_bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The highest integer, e.g. 127."""
        return (1 << (self.num_bits - 1)) - 1 if self.signed else (1 << self.num_bits) - 1

    @property
    def slack(self) -> int:
        """Steps beyond the ends that still belong to the range.

        1 for the full symmetric range, whose ends are half a step off: the largest value of a row that defined the
        step may round to ``high + 1``. Else 0.
        """
        return int(self.signed and self.symmetric and not self.restricted)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that stores an integer of this grid: int8 or uint8."""
        return torch.int8 if self.signed else torch.uint8

    @torch.no_grad()
    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the step and the zero point with which the grid covers ranges, 0 included.

        Symmetric: s = max(-low, high) / ((high - low of the grid) / 2), which is 127.5 for the full range of 8 bits,
        127 for the restricted one; unsigned: s = high / (2^bits - 1). The division happens in the dtype of the range,
        as torchao's does. Affine: s = (high - low) / (2^bits - 1), z = low of the grid - round(low / s), in float32.

        Source: the formulas of torchao and compressed-tensors; Jacob et al. 2018, arXiv:1712.05877, section 2.1.

        Args:
            low: Lower ends, any shape; a positive one counts as 0.
            high: Upper ends, same shape; a negative one counts as 0.

        Returns:
            Step in float32, at least ``EPS``, and zero point in int32 (None if symmetric), in the shape of ``low``.
        """
        if self.symmetric:
            largest = torch.maximum(-low, high) if self.signed else high.clamp_min(0)
            divisor = (self.high - self.low) / 2 if self.signed else self.high
            return largest.div(divisor).clamp_(min=EPS).to(torch.float32), None
        low, high = low.to(torch.float32).clamp_max(0), high.to(torch.float32).clamp_min(0)
        scale = ((high - low) / (self.high - self.low)).clamp_(min=EPS)
        zero_point = (self.low - torch.round(low / scale)).clamp_(self.low, self.high)
        return scale, zero_point.to(torch.int32)
