"""Write a model with integer weights, or with weights on the integer grid, as a checkpoint for ``from_pretrained``."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.config import QuantizationConfig
from hf_compress.errors import ExportError, GraphError
from hf_compress.export.formats.base import Format
from hf_compress.export.formats.table import FORMATS, find_format
from hf_compress.export.pretrained import stored_method
from hf_compress.export.saving import check_target, staged, tidy_metadata
from hf_compress.export.verification import make_reference, verify_export
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.instruments.adapters import has_adapters
from hf_compress.instruments.attach import attachment_of, detach_all
from hf_compress.instruments.fake_quantize import quantizable_layers
from hf_compress.instruments.quantize import Quantized, QuantizedLayer, attached_quantizers, make_quantizers
from hf_compress.instruments.sharded import first_not_finite
from hf_compress.instruments.targets import oriented_weight, owned_parameter, target_of
from hf_compress.quantization.quantizers import LearnedQuantizer
from hf_compress.registry import quantization_methods

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def export_quantized(
    model: PreTrainedModel,
    directory: str | Path,
    format: str = "torchao",
    exclude: Iterable[str] | None = None,
    config: QuantizationConfig | None = None,
    *,
    verify: bool = True,
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Quantize layers of a model and save it; the model itself is not changed.

    A model with quantizers is stored with exactly their steps: trained with a ``QuantizationCallback``, or calibrated.
    One without is rounded as ``config`` says, by default int8 weights per output channel and int8 inputs per token.

    Args:
        model: A floating-point model, with quantizers or without.
        directory: Where to save. A folder that holds another model is overwritten, its other files stay; that which the
            model was loaded from is refused.
        format: ``"torchao"``: int8 weights and, when loaded, integer arithmetic; loads with ``from_pretrained`` where
            torchao is installed. ``"compressed-tensors"``: 2 to 8 bits, inputs of any kind, for vLLM; loads with
            ``from_pretrained`` where compressed-tensors is installed, and computes in floating point there. (For both,
            hf_compress must be imported if layers differ in size.) ``"onnx"``: ``model.onnx`` for ONNX Runtime, in
            integer arithmetic where inputs are quantized. ``"dense"``: floating-point weights on the integer grid;
            loads everywhere, inputs are not quantized.
        exclude: Regular expressions of Linear layers to leave in floating point, see ``quantizable_layers``; for a
            model with quantizers, those that it was trained with, or None.
        config: For a model without quantizers: which numbers. Weights and dynamic inputs only, as nothing is observed.
        verify: Load what was written in a fresh process, run it, and compare it with the model with its quantizers,
            before anything is put in place. Takes a few seconds, and one forward pass of each.
        example_inputs: Keyword arguments on which the model runs; made from its config if not given.

    Returns:
        The folder.

    Raises:
        ExportError: If the format is unknown or cannot store these numbers, its library is missing, the model is
            quantized already or has gates attached, other layers are chosen than the model was trained with, the folder
            holds something else, or what was written computes something else.
        TargetError: If there is nothing to quantize or a pattern matches nothing.
    """
    chosen = find_format(format)
    _check_installed(chosen, verify)
    if not isinstance(directory, str | os.PathLike):
        raise ExportError(f"export_quantized: directory={directory!r}; allowed: the name of a folder.")
    if config is not None and not isinstance(config, QuantizationConfig):
        raise ExportError(f"export_quantized: config is a {type(config).__name__}; pass a QuantizationConfig.")
    directory = Path(directory)
    check_target(directory)
    _check_not_its_own(model, directory)
    _check_model(model)
    _check_finite(model)
    duplicate = copy.deepcopy(model)
    quantized = _quantizers(duplicate, exclude, config)
    _check_layers(chosen, quantized.layers)
    inputs = _inputs(duplicate, example_inputs, chosen, verify)
    reference = make_reference(duplicate, quantized.layers, chosen, inputs or {}) if verify else None
    detach_all(duplicate)
    with staged(directory) as folder:
        chosen.write(duplicate, quantized.layers, folder, inputs)
        for path in folder.glob("*.safetensors"):
            tidy_metadata(path)
        if reference is not None:
            verify_export(folder, chosen, reference)
    return directory


def check_format(format: str) -> None:
    """Check that a format exists and that its library is installed.

    Raises:
        ExportError: If not.
    """
    find_format(format).check_installed()


def check_storable(model: PreTrainedModel, format: str, config: QuantizationConfig | None) -> None:
    """Check that a format can store a model's layers as a config quantizes them; nothing is installed or written.

    Raises:
        ExportError: If not; the message names the formats that can.
        TargetError: If there is nothing to quantize or a pattern matches nothing.
    """
    config = config or QuantizationConfig()
    quantized = make_quantizers(config, quantizable_layers(model, config.exclude, config.targets))
    one = torch.ones(1)  # any steps do: what training or data will find is not known yet
    for observed in quantized.observed().values():
        observed.fix(one, None if observed.grid.symmetric else one.int())
    for layer in quantized.layers:
        if isinstance(layer.weights, LearnedQuantizer):
            layer.weights.initialize(oriented_weight(layer.name, layer.module).detach())
    for learned in quantized.learned().values():
        if not learned.learned:
            learned.load({"step": one} if learned.grid.symmetric else {"step": one, "offset": one})
    _check_layers(find_format(format), quantized.layers)


def _check_installed(format: Format, verify: bool) -> None:
    if format.needed_to_write or verify:
        try:
            format.check_installed()
        except ExportError as error:
            hint = "" if format.needed_to_write else " Writing alone does not need it: pass verify=False."
            raise ExportError(f"{error}{hint}") from error


def _check_not_its_own(model: PreTrainedModel, directory: Path) -> None:
    """The model would be gone, and what its folder says about it, such as its card, would be about another one."""
    source = getattr(model, "name_or_path", None)
    if source and directory.is_dir() and Path(source).is_dir() and Path(source).samefile(directory):
        raise ExportError(
            f"{directory}: is the folder that the {type(model).__name__} was loaded from, which integers would "
            "replace. Choose another folder."
        )


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


def _check_finite(model: PreTrainedModel) -> None:
    broken = first_not_finite(model)
    if broken is not None:
        raise ExportError(f"export_quantized: {broken!r} has entries that are not finite. Load or train it again.")


def _quantizers(model: PreTrainedModel, exclude: Iterable[str] | None, config: QuantizationConfig | None) -> Quantized:
    """Return the layers with the quantizers that they have, or with such as need no training, which are put on them."""
    found = attached_quantizers(model)
    if config is not None and exclude is not None:
        raise ExportError(f"export_quantized: got config and exclude={exclude!r}; say it in the config's own exclude.")
    if config is not None and found.layers:
        raise ExportError(
            "export_quantized: got config, but the model has quantizers already, which say the numbers. Leave config "
            "out, or take the quantizers off first: callback.detach()."
        )
    if not found.layers:
        found = _made(model, config or QuantizationConfig(exclude=None if exclude is None else tuple(exclude)))
    elif exclude is not None:
        targets = sorted({target_of(layer.name, layer.module) for layer in found.layers})
        _check_chosen(found, quantizable_layers(model, exclude, targets), exclude)
    found.enable(True)  # after shrink they are there and do not act
    for layer in found.layers:
        parameter = owned_parameter(layer.name, layer.module)
        dtype = torch.float32 if parameter is None else parameter.dtype
        if dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise ExportError(f"export_quantized: {layer.name!r} is {dtype}; allowed: {allowed}.")
    return found


def _check_computed(config: QuantizationConfig) -> None:
    """Check that what a config asks for follows from the weights alone.

    Raises:
        ExportError: If ranges would have to be observed, or steps trained.
    """
    if any(formats.has_observed() for formats in (config.formats(), *config.rule_formats())):
        raise ExportError(
            "export_quantized: config asks for inputs or outputs whose range has to be observed, and nothing was. "
            "Train with a QuantizationCallback or calibrate first, or set dynamic=True."
        )
    idle = {name: getattr(config, name) for name in ("begin", "observe", "freeze") if getattr(config, name)}
    idle |= {"options": dict(config.options)} if config.options else {}
    if idle:
        name, given = next(iter(idle.items()))
        raise ExportError(
            f"export_quantized: config has {name}={given!r}, which acts while a model trains or is calibrated. "
            "Call calibrate(model, data, config), or train with a QuantizationCallback, and export without config; or "
            "leave it out."
        )
    if quantization_methods.get(config.method).learns:
        raise ExportError(
            f"export_quantized: config has method {config.method!r}, whose steps have to be trained, and none were. "
            "Use method='qat', or train with a QuantizationCallback."
        )


def _made(model: PreTrainedModel, config: QuantizationConfig) -> Quantized:
    """Make the quantizers that a config asks for."""
    _check_computed(config)
    quantized = make_quantizers(config, quantizable_layers(model, config.exclude, config.targets))
    quantized.install()
    return quantized


def _check_chosen(found: Quantized, chosen: Mapping[str, Any], exclude: Iterable[str]) -> None:
    trained = {layer.name for layer in found.layers}
    if trained != set(chosen):
        raise ExportError(
            f"export_quantized: the model was trained with other layers quantized than exclude={exclude!r} gives "
            f"(first difference: {min(trained ^ set(chosen))!r}). Leave exclude out."
        )


def _check_layers(format: Format, layers: list[QuantizedLayer]) -> None:
    """Check that a format can store all layers and something of them is rounded in it; say which one could."""
    if not any(role in format.acting for layer in layers for role, _ in layer.quantizers()):
        raise ExportError(
            f"export_quantized: format {format.name!r} stores rounded {' and '.join(format.acting)}, but of this model "
            "only others are quantized, so nothing would be. Save it with save_pretrained, or quantize weights too."
        )
    for layer in layers:
        reason = format.refusal(layer)
        if reason is not None:
            able = [name for name, each in FORMATS.items() if all(each.refusal(other) is None for other in layers)]
            allowed = ", ".join(map(repr, able))
            raise ExportError(
                f"export_quantized: format {format.name!r} cannot store layer {layer.name!r} as it is quantized: it "
                f"{reason}. Formats that can: {allowed}."
            )


def _inputs(
    model: PreTrainedModel, given: Mapping[str, Any] | None, format: Format, verify: bool
) -> Mapping[str, Any] | None:
    """Return inputs on which the model runs, where they are needed."""
    if not (verify or format.records):
        if given is not None:
            raise ExportError(
                f"export_quantized: example_inputs have no effect with format {format.name!r} and verify=False."
            )
        return None
    if given is not None:
        return given
    try:
        return make_example_inputs(model)
    except GraphError as error:
        raise ExportError(
            f"export_quantized: {error} They are needed to check what is written; pass example_inputs, or verify=False."
        ) from error
