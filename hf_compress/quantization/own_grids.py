"""Quantizers without steps: signs, and the values of DoReFa-Net."""

from torch import Tensor

from hf_compress.quantization.binary import binarize
from hf_compress.quantization.dorefa import dorefa_activation, dorefa_gradient, dorefa_weight
from hf_compress.quantization.granularity import Granularity
from hf_compress.quantization.quantizers import Prepared, Quantizer


class SignQuantizer(Quantizer):
    """One bit: the sign, see ``binary.binarize``.

    Args:
        granularity: Over which values the mean of magnitudes is taken.
        scaled: Multiply by that mean.
    """

    ignores_zeros = False

    def __init__(self, granularity: Granularity, *, scaled: bool) -> None:
        self.granularity = granularity
        self._scaled = scaled

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return signs, scaled or not."""
        keep = None if removed is None else ~removed
        return binarize(x, scaled=self._scaled, granularity=self.granularity, keep=keep)


class DorefaWeightQuantizer(Quantizer):
    """Weights of DoReFa-Net, see ``dorefa.dorefa_weight``.

    Args:
        num_bits: 2 to 8.
        scaled: Give the weight the magnitude back that it had: multiply by max|w|. Without, it is in [-1, 1].
    """

    ignores_zeros = False

    def __init__(self, num_bits: int, *, scaled: bool) -> None:
        self._num_bits, self._scaled = num_bits, scaled

    @property
    def num_bits(self) -> int:
        """Return the bits of a value."""
        return self._num_bits

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return values in [-1, 1], or scaled by a constant."""
        values = dorefa_weight(x, self._num_bits, None if removed is None else ~removed)
        if not self._scaled:
            return values
        kept = x.detach() if removed is None else x.detach().masked_fill(removed, 0.0)
        return values * kept.abs().max()


class DorefaInputQuantizer(Quantizer):
    """Activations of DoReFa-Net in [0, 1], see ``dorefa.dorefa_activation``."""

    def __init__(self, num_bits: int) -> None:
        self._num_bits = num_bits

    @property
    def num_bits(self) -> int:
        """Return the bits of a value."""
        return self._num_bits

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return values in [0, 1]."""
        return dorefa_activation(x, self._num_bits)


class DorefaGradientQuantizer(Quantizer):
    """Leaves the tensor as it is and rounds its gradient, see ``dorefa.dorefa_gradient``."""

    def __init__(self, num_bits: int) -> None:
        self._num_bits = num_bits

    def fake_quantize(self, x: Tensor, removed: Tensor | None, prepared: Prepared) -> Tensor:
        """Return the tensor."""
        return dorefa_gradient(x, self._num_bits)
