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

from hf_compress.errors import ExportError, choices
from hf_compress.export.pretrained import CompressedConfig, choose_guard, is_uneven, stored_method
from hf_compress.instruments.adapters import has_adapters
from hf_compress.instruments.attach import attachment_of, detach_all
from hf_compress.instruments.fake_quantize import fake_quantized_modules, quantizable_linears
from hf_compress.quantization.numerics import dequantize, quantize
from hf_compress.quantization.quantizers import Int8Dynamic

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
        exclude: Regular expressions of Linear layers to leave in floating point, see ``quantizable_linears``.

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
    names = list(_check_model(model, exclude))
    duplicate = copy.deepcopy(model)
    detach_all(duplicate)
    FORMATS[format](duplicate, names)
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


def _check_model(model: PreTrainedModel, exclude: Iterable[str] | None) -> dict[str, nn.Module]:
    if getattr(model, "is_quantized", False) or stored_method(model) not in (None, "hf_compress"):
        raise ExportError(
            f"export_quantized: the {type(model).__name__} is quantized already; pass the floating-point model."
        )
    if has_adapters(model):
        raise ExportError(
            f"export_quantized: the {type(model).__name__} has PEFT adapters, which integer weights cannot take in. "
            "Merge them first: model = model.merge_and_unload()."
        )
    linears = quantizable_linears(model, exclude)
    attached = [each for module in model.modules() if (each := attachment_of(module)) is not None]
    if any(attachment.input_gates for attachment in attached):
        raise ExportError("export_quantized: pruning gates are attached to the model; call shrink() first.")
    if any(attachment.weight_mask is not None for attachment in attached):
        raise ExportError("export_quantized: weight masks are attached to the model; fold and remove them first.")
    trained = set(fake_quantized_modules(model))
    if trained and trained != set(linears):
        first = min(trained ^ set(linears))
        raise ExportError(
            f"export_quantized: the model was trained with other layers quantized than exclude={exclude!r} gives "
            f"(first difference: {first!r}). Use the exclude of its QuantizationConfig."
        )
    for name, module in linears.items():
        dtype = module.get_parameter("weight").dtype
        if dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise ExportError(f"export_quantized: {name!r} is {dtype}; allowed: {allowed}.")
    return linears


@torch.no_grad()
def _to_dense(model: PreTrainedModel, names: list[str]) -> None:
    scheme = Int8Dynamic()
    for name in _progress(names):
        weight = model.get_submodule(name).get_parameter("weight")
        scale = scheme.weight_scale(weight)
        weight.copy_(dequantize(quantize(weight, scale), scale, weight.dtype))


@torch.no_grad()
def _to_torchao(model: PreTrainedModel, names: list[str]) -> None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
        from transformers import TorchAoConfig
    except ImportError as error:
        raise ExportError(f"export_quantized: {_NO_TORCHAO} ({error})") from error
    scheme = Int8Dynamic()
    inputs = QuantizeTensorToInt8Kwargs(PerRow())
    for name in _progress(names):
        module: Any = model.get_submodule(name)
        scale = scheme.weight_scale(module.weight)
        weight = Int8Tensor.from_hp(module.weight.detach(), PerRow(), scale=scale, act_quant_kwargs=inputs)
        module.weight = nn.Parameter(weight, requires_grad=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in linears if name not in set(names)]
    config: Any = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    if is_uneven(model):
        stored = model.config.quantization_config
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        guard = choose_guard(model, stored["shapes"])
        config = CompressedConfig(**{**stored, "inner": config.to_dict(), "guard": guard})
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)


def _progress(names: list[str]) -> Any:
    """Show a bar where transformers would, see ``transformers.utils.logging.disable_progress_bar``."""
    bars: Any = logging
    return bars.tqdm(names, desc="Quantizing layers")


FORMATS: dict[str, Callable[[PreTrainedModel, list[str]], None]] = {"torchao": _to_torchao, "dense": _to_dense}
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
