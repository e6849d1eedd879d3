"""Floating-point weights on the integer grid: loads everywhere, and runs in floating point."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.export.formats.base import Format, progress
from hf_compress.instruments.quantize import Quantized, QuantizedLayer
from hf_compress.instruments.targets import oriented_weight, write_weight


class Dense(Format):
    """Rounds the weights; inputs and outputs are not rounded when it is loaded."""

    name = "dense"
    acting = ("weights",)

    def refusal(self, layer: QuantizedLayer) -> str | None:
        """Return None: any values can be stored, only not what happens to inputs."""
        return None

    @torch.no_grad()
    def write(
        self, model: PreTrainedModel, layers: list[QuantizedLayer], folder: Path, inputs: Mapping[str, Any] | None
    ) -> None:
        """Write a model, see ``Format.write``."""
        for layer in progress(Quantized(layers).weighted()):
            assert layer.weights is not None
            weight = oriented_weight(layer.name, layer.module)
            write_weight(layer.name, layer.module, layer.weights.quantize_weight(weight))
        model.save_pretrained(folder)
