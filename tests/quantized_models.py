"""Put quantizers on layers, and what int8 weights and inputs come to, in one line each."""

from collections.abc import Mapping
from typing import Any

import torch
from row_numerics import fake_quantize, symmetric_scale
from torch import Tensor, nn

from hf_compress import make_example_inputs
from hf_compress.config import QuantizationConfig
from hf_compress.instruments.adapters import named_plain_modules
from hf_compress.instruments.fake_quantize import is_fake_quantized, quantizable_layers
from hf_compress.instruments.quantize import Quantized, make_quantizers
from hf_compress.instruments.targets import oriented_weight
from hf_compress.quantization.granularity import PER_TENSOR
from hf_compress.quantization.observers import Mse
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer


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


FORMAT_CASES: dict[str, dict[str, Any]] = {
    "int8_dynamic": {},
    "int8_static": {"scheme": "int8_static"},
    "int8_static_symmetric": {"scheme": "int8_static", "inputs": {"symmetric": True}},
    "int8_weight_only": {"scheme": "int8_weight_only"},
    "int8_affine_weights": {"scheme": "int8_weight_only", "weights": {"symmetric": False}},
    "int4_weight_only": {"scheme": "int4_weight_only", "weights": {"group_size": 4}},
    "int4_per_channel": {"scheme": "int4_weight_only", "weights": {"granularity": "channel"}},
    "lsq": {"method": "lsq"},
    "lsq_static": {"method": "lsq", "scheme": "int8_static", "inputs": {"symmetric": True}},
    "lsq_weight_only": {"method": "lsq", "scheme": "int8_weight_only"},
    "outputs": {"scheme": "int8_static", "outputs": {"symmetric": False}},
}
"""What a model may have been trained with, as settings of ``QuantizationConfig``."""


def quantized(model: Any, case: str, **changes: Any) -> Quantized:
    """Put quantizers on a model as a case says; ranges are observed, and steps learned away from where they began."""
    config = {**FORMAT_CASES[case], **changes}
    found = install_quantizers(quantizable_layers(model), **config)
    for layer in found.layers:
        if isinstance(layer.weights, LearnedQuantizer):
            layer.weights.initialize(oriented_weight(layer.name, layer.module).detach())
            layer.weights.learned["step"].data.mul_(1.03)
    waiting = [*found.observed().values(), *(each for each in found.learned().values() if not each.learned)]
    for each in waiting:
        each.collector = each.observer if isinstance(each, ObservedQuantizer) else Mse(each.grid, PER_TENSOR)
    if waiting:
        found.enable(False)
        with torch.no_grad():
            model.train()(**make_example_inputs(model, seed=1))
        model.eval()
        found.enable(True)
    for each in waiting:
        if isinstance(each, ObservedQuantizer):
            each.settle()
        else:
            each.initialize(each.collector)
        each.collector = None
    return found


def fake_quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that have a fake quantizer, in the order of the model."""
    return [name for name, module in named_plain_modules(model) if is_fake_quantized(module)]
