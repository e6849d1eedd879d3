"""torchao's int8: integer weights and, where inputs are quantized, integer arithmetic when loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from hf_compress.errors import ExportError
from hf_compress.export.combined import with_sizes
from hf_compress.export.formats.base import Format, progress, range_of_its_own
from hf_compress.instruments.attach import own_class
from hf_compress.instruments.quantize import QuantizedLayer
from hf_compress.quantization.granularity import PER_TOKEN, per_channel
from hf_compress.quantization.quantizers import Quantizer, RangeQuantizer


class TorchAo(Format):
    """int8 weights per output channel; inputs int8 per token, or in floating point.

    4 bits are refused: what torchao can store of them needs a GPU of a certain kind, or takes a byte for each value.
    """

    name = "torchao"
    packages = ("torchao",)
    extra = "int8"

    def refusal(self, layer: QuantizedLayer) -> str | None:
        """Return what torchao's int8 kernel does not compute as it was trained."""
        if not isinstance(layer.module, nn.Linear):
            return f"is a {own_class(layer.module).__name__}; torchao's int8 is for Linear layers"
        if not _is_int8(layer.weights) or layer.weights is None or layer.weights.granularity != per_channel(0):
            return "needs int8 symmetric weights per channel"
        dynamic = isinstance(layer.inputs, RangeQuantizer) and layer.inputs.granularity == PER_TOKEN
        if layer.inputs is not None and not (dynamic and _is_int8(layer.inputs)):
            return "needs int8 symmetric dynamic inputs per token, or none"
        other = range_of_its_own(layer)
        if other is not None:
            return other
        if layer.outputs is not None:
            return "has quantized outputs, which torchao's int8 kernel does not round"
        return None

    @torch.no_grad()
    def write(
        self, model: PreTrainedModel, layers: list[QuantizedLayer], folder: Path, inputs: Mapping[str, Any] | None
    ) -> None:
        """Write a model, see ``Format.write``."""
        try:
            from torchao.quantization import Int8Tensor, PerRow
            from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
        except ImportError as error:
            raise ExportError(f"{self.installation('torchao')} ({error})") from error
        for layer in progress(layers):
            module: Any = layer.module
            assert layer.weights is not None
            scale = layer.weights.parameters(module.weight)[0][:, None]
            kwargs = None if layer.inputs is None else QuantizeTensorToInt8Kwargs(PerRow())
            weight = Int8Tensor.from_hp(module.weight.detach(), PerRow(), scale=scale, act_quant_kwargs=kwargs)
            module.weight = nn.Parameter(weight, requires_grad=False)
        config = with_sizes(model, _config(model, layers))
        model.config.quantization_config = config
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        model.save_pretrained(folder)


def _config(model: PreTrainedModel, layers: list[QuantizedLayer]) -> Any:
    """Return what tells transformers which weights are integers; how they compute is stored with each."""
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    chosen = {
        layer.name: Int8WeightOnlyConfig() if layer.inputs is None else Int8DynamicActivationInt8WeightConfig()
        for layer in layers
    }
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in linears if name not in chosen]
    alike = len({type(each) for each in chosen.values()}) == 1
    kind = next(iter(chosen.values())) if alike else FqnToConfig(fqn_to_config=chosen)
    return TorchAoConfig(kind, modules_to_not_convert=kept)


def _is_int8(quantizer: Quantizer | None) -> bool:
    grid = None if quantizer is None else quantizer.grid
    return grid is not None and grid.num_bits == 8 and grid.symmetric
