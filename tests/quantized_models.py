"""Put quantizers on layers, and what int8 weights and inputs come to, in one line each."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_compress.config import QuantizationConfig
from hf_compress.instruments.quantize import Quantized, make_quantizers
from hf_compress.quantization.numerics import fake_quantize, symmetric_scale


def install_quantizers(layers: Mapping[str, nn.Module], **config: Any) -> Quantized:
    """Quantize layers as a config says; int8_dynamic by default."""
    quantized = make_quantizers(QuantizationConfig(**config), layers)
    quantized.install()
    return quantized


def on_int8_grid(x: Tensor) -> Tensor:
    """Return a weight or an input as scheme int8_dynamic rounds it: a step for each row."""
    return fake_quantize(x, symmetric_scale(x))


SETTINGS: dict[str, dict[str, Any]] = {
    "qat": {},
    "static": {"scheme": "int8_static", "outputs": {"num_bits": 8}},
    "lsq": {"method": "lsq", "weights": {"num_bits": 4}, "inputs": {"granularity": "tensor", "dynamic": False}},
    "lsq_plus": {"method": "lsq_plus", "scheme": "int8_static"},
    "dorefa": {
        "method": "dorefa",
        "weights": {"num_bits": 4, "granularity": "tensor"},
        "inputs": False,
        "options": {"gradient_bits": 8},
    },
    "bnn": {"method": "bnn", "weights": {"num_bits": 1}, "inputs": False},
}
"""Settings of a QuantizationConfig for every method that trains, and for observed ranges."""
