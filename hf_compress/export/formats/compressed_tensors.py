"""The compressed-tensors format, which transformers and vLLM load; written without that library.

Layout of a layer: ``weight`` int8 [outputs, inputs] (``int-quantized``), or ``weight_packed`` int32 [outputs, words]
and ``weight_shape`` (``pack-quantized``); ``weight_scale`` [outputs, groups], or [1]; ``weight_zero_point`` if affine;
``input_scale`` [1] and ``input_zero_point`` [1] of observed ranges. Source: the compressed-tensors library,
``compressors/naive_quantized`` and ``compressors/pack_quantized``.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.export.combined import guard_of, with_sizes
from hf_compress.export.formats.base import Format, progress, range_of_its_own, stored_weight, without_grid
from hf_compress.export.pretrained import reshape_parameter
from hf_compress.instruments.attach import own_class
from hf_compress.instruments.quantize import QuantizedLayer
from hf_compress.quantization.quantizers import Quantizer, RangeQuantizer

VERSION = "0.20.0"
"""Of the library that the layout was taken from and checked with."""

WORD = 32
"""Bits of a word that integers are packed into."""


class CompressedTensors(Format):
    """int8 or packed integers; transformers computes with their values in floating point, vLLM with int8 kernels."""

    name = "compressed-tensors"
    packages = ("compressed_tensors",)
    extra = "compressed-tensors"
    needed_to_write = False

    def refusal(self, layer: QuantizedLayer) -> str | None:
        """Return what the format cannot store."""
        if not isinstance(layer.module, nn.Linear):
            return f"is a {own_class(layer.module).__name__}; compressed-tensors stores Linear layers"
        if layer.weights is None:
            return "has quantized inputs or outputs alone; compressed-tensors needs integer weights with them"
        if not _whole(layer.weights) and layer.weights.grid is not None and not layer.weights.grid.symmetric:
            return "has packed weights with zero points, which transformers cannot load: use symmetric ones, or 8 bits"
        role = without_grid(layer)
        if role is not None:
            return f"has {role} that are no integers times a step"
        other = range_of_its_own(layer)
        if other is not None:
            return other
        dtype = layer.module.weight.dtype
        for role, quantizer in layer.quantizers():
            scale = _scale(layer, quantizer)
            if scale is not None and not torch.equal(scale.to(dtype).float(), scale):
                return f"has steps of {role} that {dtype}, in which they are stored, would round: use model.float()"
        return None

    @torch.no_grad()
    def write(
        self, model: PreTrainedModel, layers: list[QuantizedLayer], folder: Path, inputs: Mapping[str, Any] | None
    ) -> None:
        """Write a model, see ``Format.write``."""
        groups: dict[str, dict[str, Any]] = {}
        schemes = {layer.name: _scheme(layer) for layer in layers}
        for name, scheme in schemes.items():
            group = groups.setdefault(json.dumps(scheme, sort_keys=True), {"targets": [], **scheme})
            group["targets"].append(name)
        config = with_sizes(model, _config(model, list(groups.values())))
        for layer in progress(layers):
            _store(layer, schemes[layer.name]["format"])
        guard = guard_of(config)
        if guard is not None:
            reshape_parameter(model, guard, lambda stored: stored.unsqueeze(0))
        model.config.quantization_config = config
        model.save_pretrained(folder)


def pack(integers: Tensor, num_bits: int) -> Tensor:
    """Pack integers along rows, the first into the lowest bits, without gaps: 32 of them fill ``num_bits`` words.

    Args:
        integers: int8 [rows, columns], from -2^(bits - 1) on; they are stored from 0 on.
        num_bits: 1 to 8.

    Returns:
        int32 [rows, ceil(columns * num_bits / 32)].
    """
    rows, columns = integers.shape
    unsigned = integers.to(torch.int64) + (1 << (num_bits - 1))
    bits = (unsigned[..., None] >> torch.arange(num_bits)) & 1
    flat = torch.zeros(rows, math.ceil(columns * num_bits / WORD) * WORD, dtype=torch.int64)
    flat[:, : columns * num_bits] = bits.reshape(rows, -1)
    words = (flat.view(rows, -1, WORD) << torch.arange(WORD)).sum(-1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)


def _store(layer: QuantizedLayer, format: str) -> None:
    """Replace the weight of a layer by what is stored."""
    module: Any = layer.module
    dtype, stored = module.weight.dtype, stored_weight(layer)
    tensors = {"weight_scale": stored.per_row(stored.scale).to(dtype)}
    if format == "pack-quantized":
        tensors["weight_packed"] = pack(stored.integers, stored.grid.num_bits)
        tensors["weight_shape"] = torch.tensor(stored.integers.shape)
    else:
        tensors["weight"] = stored.integers
    if stored.zero_point is not None:
        tensors["weight_zero_point"] = stored.per_row(stored.zero_point).to(torch.int8)
    for role, name in (("inputs", "input"), ("outputs", "output")):
        quantizer = getattr(layer, role)
        if quantizer is not None and not isinstance(quantizer, RangeQuantizer):
            scale, zero_point = quantizer.parameters()
            tensors[f"{name}_scale"] = scale.detach().to(dtype)
            if zero_point is not None:
                tensors[f"{name}_zero_point"] = zero_point.to(torch.int8)
    del module.weight
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor.cpu().contiguous(), requires_grad=False))


def _whole(quantizer: Quantizer) -> bool:
    """Return whether each integer is stored in a byte of its own."""
    return quantizer.num_bits == 8 and quantizer.granularity.kind != "group"


def _scheme(layer: QuantizedLayer) -> dict[str, Any]:
    weights = layer.weights
    assert weights is not None
    return {
        "format": "int-quantized" if _whole(weights) else "pack-quantized",
        "weights": _arguments(weights, dynamic=False),
        "input_activations": _activations(layer.inputs),
        "output_activations": _activations(layer.outputs),
    }


def _activations(quantizer: Quantizer | None) -> dict[str, Any] | None:
    return None if quantizer is None else _arguments(quantizer, dynamic=isinstance(quantizer, RangeQuantizer))


def _arguments(quantizer: Quantizer, *, dynamic: bool) -> dict[str, Any]:
    grid, granularity = quantizer.grid, quantizer.granularity
    assert grid is not None
    return {
        "num_bits": grid.num_bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": granularity.kind,
        "group_size": granularity.size or None,
        "dynamic": dynamic,
    }


def _config(model: PreTrainedModel, groups: list[dict[str, Any]]) -> dict[str, Any]:
    quantized = {name for group in groups for name in group["targets"]}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if len(groups) == 1:  # the usual form, which other loaders and other heads understand
        groups[0]["targets"] = ["Linear"]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": [name for name in linears if name not in quantized],
        "version": VERSION,
    }


def _scale(layer: QuantizedLayer, quantizer: Quantizer) -> Tensor | None:
    """Return the steps that are stored, float32, or None if they are computed at every call."""
    if quantizer is layer.weights:
        return stored_weight(layer).scale
    return None if isinstance(quantizer, RangeQuantizer) else quantizer.parameters()[0].detach()
