"""Write a model with integer weights, or with weights on the integer grid, as a checkpoint for ``from_pretrained``."""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from hf_compress.config import QuantizationConfig
from hf_compress.errors import ExportError, choices
from hf_compress.export.pretrained import CompressedConfig, choose_guard, is_uneven, stored_method
from hf_compress.instruments.adapters import has_adapters
from hf_compress.instruments.attach import attachment_of, detach_all
from hf_compress.instruments.fake_quantize import quantizable_layers
from hf_compress.instruments.quantize import (
    Quantized,
    QuantizedLayer,
    attached_quantizers,
    make_quantizers,
)
from hf_compress.instruments.targets import oriented_weight, owned_parameter, target_of, write_weight
from hf_compress.quantization.granularity import PER_TOKEN, per_channel
from hf_compress.quantization.quantizers import Quantizer, RangeQuantizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NO_TORCHAO = (
    "format 'torchao' needs the torchao package. Install it with: pip install 'hf-compress[int8]'; or use "
    "format='dense'."
)
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def export_quantized(
    model: PreTrainedModel, directory: str | Path, format: str = "torchao", exclude: Iterable[str] | None = None
) -> Path:
    """Quantize the Linear layers of a model and save it; the model itself is not changed.

    The numbers are those of scheme ``"int8_dynamic"``: int8 weights per output channel, int8 inputs per token.

    Args:
        model: A floating-point model: trained with a ``QuantizationCallback``, shrunk, or neither.
        directory: Where to save. A folder that holds a model is overwritten, its other files stay.
        format: ``"torchao"``: integer weights and, when loaded, integer arithmetic; loads with
            ``from_pretrained`` where torchao is installed (and hf_compress imported, if layers differ in size).
            ``"dense"``: floating-point weights on the integer grid; loads everywhere, inputs are not quantized.
        exclude: Regular expressions of Linear layers to leave in floating point, see ``quantizable_layers``.

    Returns:
        The folder.

    Raises:
        ExportError: If the format is unknown, its library is missing, the model is quantized already or has gates
            attached, other layers are chosen than the model was trained with, or the folder holds something else.
        TargetError: If there is nothing to quantize or a pattern matches nothing.
    """
    check_format(format)
    directory = Path(directory)
    _check_target(directory)
    _check_model(model)
    duplicate = copy.deepcopy(model)
    layers = _layers(duplicate, exclude).layers
    detach_all(duplicate)
    FORMATS[format](duplicate, layers)
    _save(duplicate, directory)
    return directory


def check_format(format: str) -> None:
    """Check that a format exists and that its library is installed.

    Raises:
        ExportError: If not.
    """
    if format not in FORMATS:
        raise ExportError(f"export_quantized: unknown format {format!r}; {choices(format, FORMATS)}.")
    if format == "torchao" and find_spec("torchao") is None:
        raise ExportError(f"export_quantized: {_NO_TORCHAO}")


def _check_model(model: PreTrainedModel) -> None:
    if getattr(model, "is_quantized", False) or stored_method(model) not in (None, "hf_compress"):
        raise ExportError(
            f"export_quantized: the {type(model).__name__} is quantized already; pass the floating-point model."
        )
    if has_adapters(model):
        raise ExportError(
            f"export_quantized: the {type(model).__name__} has PEFT adapters, which integer weights cannot take in. "
            "Merge them first: model = model.merge_and_unload()."
        )
    attached = [each for module in model.modules() if (each := attachment_of(module)) is not None]
    if any(attachment.input_gates for attachment in attached):
        raise ExportError("export_quantized: pruning gates are attached to the model; call shrink() first.")
    if any(attachment.weight_mask is not None for attachment in attached):
        raise ExportError("export_quantized: weight masks are attached to the model; fold and remove them first.")


def _layers(model: PreTrainedModel, exclude: Iterable[str] | None) -> Quantized:
    """Return the layers with the quantizers that they were trained with, or such as need no training."""
    found = attached_quantizers(model)
    targets = sorted({target_of(layer.name, layer.module) for layer in found.layers}) or ["linear"]
    chosen = quantizable_layers(model, exclude, targets)
    if not found.layers:
        found = make_quantizers(QuantizationConfig(exclude=None if exclude is None else tuple(exclude)), chosen)
    trained = {layer.name for layer in found.layers}
    if trained != set(chosen):
        first = min(trained ^ set(chosen))
        raise ExportError(
            f"export_quantized: the model was trained with other layers quantized than exclude={exclude!r} gives "
            f"(first difference: {first!r}). Use the exclude of its QuantizationConfig."
        )
    for layer in found.layers:
        parameter = owned_parameter(layer.name, layer.module)
        dtype = torch.float32 if parameter is None else parameter.dtype
        if dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise ExportError(f"export_quantized: {layer.name!r} is {dtype}; allowed: {allowed}.")
    return found


@torch.no_grad()
def _to_dense(model: PreTrainedModel, layers: list[QuantizedLayer]) -> None:
    for layer in _progress(Quantized(layers).weighted()):
        if layer.weights is not None:
            weight = oriented_weight(layer.name, layer.module)
            write_weight(layer.name, layer.module, layer.weights.quantize_weight(weight))


@torch.no_grad()
def _to_torchao(model: PreTrainedModel, layers: list[QuantizedLayer]) -> None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
        from transformers import TorchAoConfig
    except ImportError as error:
        raise ExportError(f"export_quantized: {_NO_TORCHAO} ({error})") from error
    for layer in layers:
        _check_torchao(layer)
    inputs = QuantizeTensorToInt8Kwargs(PerRow())
    for layer in _progress(layers):
        module: Any = layer.module
        assert layer.weights is not None
        scale = layer.weights.parameters(module.weight)[0][:, None]
        weight = Int8Tensor.from_hp(module.weight.detach(), PerRow(), scale=scale, act_quant_kwargs=inputs)
        module.weight = nn.Parameter(weight, requires_grad=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in linears if name not in {layer.name for layer in layers}]
    config: Any = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    if is_uneven(model):
        stored = model.config.quantization_config
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        guard = choose_guard(model, stored["shapes"])
        config = CompressedConfig(**{**stored, "inner": config.to_dict(), "guard": guard})
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)


def _check_torchao(layer: QuantizedLayer) -> None:
    """Check that torchao's int8 kernel computes what was trained.

    Raises:
        ExportError: If not.
    """

    def int8(quantizer: Quantizer | None) -> bool:
        grid = None if quantizer is None else quantizer.grid
        return grid is not None and grid.num_bits == 8 and grid.symmetric

    weights, inputs = layer.weights, layer.inputs
    per_row = isinstance(inputs, RangeQuantizer) and inputs.granularity == PER_TOKEN
    right = int8(weights) and weights is not None and weights.granularity == per_channel(0)
    if not (right and int8(inputs) and per_row and layer.outputs is None and isinstance(layer.module, nn.Linear)):
        raise ExportError(
            f"export_quantized: {layer.name!r} is not quantized as torchao's int8 kernel computes: a Linear, int8 "
            "symmetric weights per channel and int8 symmetric dynamic inputs per token (scheme 'int8_dynamic'). Use "
            "format='dense' for other numbers, or train with that scheme."
        )


def _progress(layers: list[QuantizedLayer]) -> Any:
    """Show a bar where transformers would, see ``transformers.utils.logging.disable_progress_bar``."""
    bars: Any = logging
    return bars.tqdm(layers, desc="Quantizing layers")


Writer = Callable[[PreTrainedModel, list[QuantizedLayer]], None]

FORMATS: dict[str, Writer] = {"torchao": _to_torchao, "dense": _to_dense}
"""Name of a format -> what it does to the model before it is saved."""


def _check_target(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ExportError(f"{directory}: is a file; allowed: a folder, or a path that does not exist.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "config.json").is_file():
        raise ExportError(
            f"{directory}: holds files but no model (no config.json), so it is not overwritten. Choose another folder."
        )


def _save(model: PreTrainedModel, directory: Path) -> None:
    """Save beside the target, then move file by file; ``config.json`` goes first and comes last.

    Without it nothing loads the folder, so a process killed in between leaves no mix of two models that loads.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.save_pretrained(staging)
        for path in staging.glob("*.safetensors"):
            _tidy_metadata(path)
        directory.mkdir(exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        for stale in [path for path in directory.iterdir() if _WEIGHT_FILE.fullmatch(path.name)]:
            stale.unlink()
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _tidy_metadata(path: Path) -> None:
    """Mend the metadata of a weight file.

    safetensors writes it in random order, so equal models would differ in bytes. torchao's list of tensors must not
    hold tensors of the model itself, such as BART's ``final_logits_bias``: its loader takes every name apart at a dot.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = dict(sorted(header["__metadata__"].items()))
        if "tensor_names" in metadata:
            names = json.loads(metadata["tensor_names"])
            metadata["tensor_names"] = json.dumps([name for name in names if "." in name])
        header["__metadata__"] = metadata
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the offsets that follow count from the header's end, so its length stays
            file.seek(8)
            file.write(text.ljust(size))
