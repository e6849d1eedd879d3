"""What quantizers know, as plain data: to look at, to store, and to put on a model again."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.config.quantization import TARGETS
from hf_compress.errors import ConfigError, TargetError, choices
from hf_compress.instruments.fake_quantize import check_fake_quantizable
from hf_compress.instruments.quantize import Quantized, QuantizedLayer, attached_quantizers
from hf_compress.instruments.targets import LEAVES, oriented_weight, owned_parameter, sites, target_of
from hf_compress.oneshot.prune import check_prunable
from hf_compress.ptq.calibrate import CalibrationResult
from hf_compress.quantization.methods import Ptq, PtqOptions
from hf_compress.quantization.quantizers import ObservedQuantizer, Quantizer, RangeQuantizer
from hf_compress.reading import read_json
from hf_compress.registry import quantization_methods

VERSION = 1
LAYER_KEYS = frozenset({"digest", *LayerFormats.ROLES})
FORMAT_KEYS = frozenset(TensorFormat().to_dict())
TENSOR_KEYS = FORMAT_KEYS | {"method", "signed", "scale", "zero_point", "low", "high"}


def calibration_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the quantizers on a model know, as plain dicts, lists, numbers and strings for ``json.dump``.

    By layer: ``"digest"``, a digest of its weight and bias, and for each of ``"weights"``, ``"inputs"``, ``"outputs"``
    that is quantized the fields of ``TensorFormat``, ``"method"``, ``"signed"``, and lists with one number for each
    step: ``"scale"``, ``"zero_point"`` (None if symmetric), ``"low"`` and ``"high"`` (the range; None where it is not
    known). Steps that are computed at every call (``"dynamic"``) are None.

    Args:
        model: After ``calibrate``, or after training with a ``QuantizationCallback``.

    Raises:
        TargetError: If there are no quantizers, or some have no steps.
    """
    quantized = attached_quantizers(model)
    if not quantized.layers:
        raise TargetError("calibration_config: the model has no quantizers. Call calibrate() first.")
    return {"version": VERSION, "layers": {layer.name: _stored(layer) for layer in quantized.layers}}


def apply_calibration_config(
    model: PreTrainedModel, calibration: Mapping[str, Any] | str | Path, *, other_weights: bool = False
) -> CalibrationResult:
    """Put the quantizers that ``calibration_config`` has described on a floating-point model.

    With the same weights the model then computes bit for bit what the calibrated one does. GPTQ, ``smooth``,
    ``equalize`` and ``bias_correction`` change weights, which are not in the description: save the model after
    ``calibrate`` (``save_pretrained`` stores floating-point weights), and load that.

    Args:
        model: Without quantizers.
        calibration: What ``calibration_config`` has returned, or a JSON file of it.
        other_weights: Use the description for weights that differ from those that were calibrated.

    Returns:
        What is quantized now.

    Raises:
        ConfigError: If the description is none, has unknown or missing keys, or numbers that cannot be.
        TargetError: If the model lacks a layer, has other sizes or other weights, or quantizers already.
    """
    layers = _read(calibration)
    check_prunable("apply_calibration_config", model, None)
    modules = {name: module for target in TARGETS for name, module in sites(model, target)}
    for name in layers:
        if name not in modules:
            raise TargetError(
                f"apply_calibration_config: {type(model).__name__} has no {name!r} that could be quantized; "
                f"{choices(name, modules)}."
            )
    check_fake_quantizable({name: modules[name] for name in layers})
    quantized = Quantized([_layer(name, modules[name], entry) for name, entry in layers.items()])
    _share_tied(quantized)
    if not other_weights:
        for name, entry in layers.items():
            if entry["digest"] != _digest(name, modules[name]):
                raise TargetError(
                    f"apply_calibration_config: the weight or bias of {name!r} is not the one that was calibrated. It "
                    "was changed by calibrate (gptq, smooth, equalize, bias_correction; load the model that was saved "
                    "afterwards), or is of another checkpoint or dtype: if that is meant, set other_weights=True."
                )
    quantized.install()
    return CalibrationResult(tuple(layers), quantized=quantized)


def _stored(layer: QuantizedLayer) -> dict[str, Any]:
    found: dict[str, Any] = {"digest": _digest(layer.name, layer.module)}
    for role, quantizer in layer.quantizers():
        weight = oriented_weight(layer.name, layer.module).detach() if role == "weights" else None
        try:
            found[role] = _tensor(quantizer, weight)
        except TargetError as error:
            raise TargetError(f"calibration_config: {layer.name!r}, {role}: {error}") from error
    return found


def _tensor(quantizer: Quantizer, weight: Tensor | None) -> dict[str, Any]:
    wanted = quantizer.format
    if wanted is None or quantizer.grid is None:
        raise TargetError(f"{type(quantizer).__name__} has no integer grid, so there are no steps to store.")
    steps: tuple[Tensor | None, Tensor | None] = (None, None)
    limits: tuple[Tensor | None, Tensor | None] = (None, None)
    if weight is not None:
        steps = quantizer.parameters(weight)
        limits = quantizer.range(weight) if isinstance(quantizer, RangeQuantizer) else limits
    elif not wanted.dynamic:
        steps = quantizer.parameters()
        limits = (quantizer.limits or limits) if isinstance(quantizer, ObservedQuantizer) else limits
    names = ("scale", "zero_point", "low", "high")
    numbers = {name: None if each is None else each.tolist() for name, each in zip(names, steps + limits, strict=True)}
    return {"method": quantizer.method, "signed": quantizer.grid.signed, **wanted.to_dict(), **numbers}


def _digest(name: str, module: nn.Module) -> str:
    """Return a digest of the values of a layer's weight and bias."""
    found = hashlib.sha256()
    bias = getattr(module, "bias", None) if target_of(name, module) in LEAVES else None
    for parameter in (owned_parameter(name, module), bias):
        if isinstance(parameter, Tensor):
            found.update(str(parameter.dtype).encode())
            found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _read(given: Any) -> dict[str, Mapping[str, Any]]:
    if isinstance(given, str | Path):
        try:
            given = read_json(Path(given))
        except (OSError, ValueError) as error:
            raise ConfigError(f"apply_calibration_config: {given} cannot be read as JSON: {error}") from error
    _check_keys("the description", given, {"version", "layers"}, {"version", "layers"})
    if given["version"] != VERSION:
        raise ConfigError(
            f"apply_calibration_config: version {given['version']!r}; allowed: {VERSION}. Upgrade hf-compress."
        )
    _check_keys("layers", given["layers"], None, set())
    for name, entry in given["layers"].items():
        _check_keys(f"layer {name!r}", entry, LAYER_KEYS, {"digest"})
        if len(entry) == 1:
            raise ConfigError(f"apply_calibration_config: layer {name!r} has none of {', '.join(LayerFormats.ROLES)}.")
        for role in entry.keys() - {"digest"}:
            _check_keys(f"layer {name!r}, {role}", entry[role], TENSOR_KEYS, TENSOR_KEYS)
    if not given["layers"]:
        raise ConfigError("apply_calibration_config: the description has no layer.")
    found: dict[str, Mapping[str, Any]] = dict(given["layers"])
    return found


def _check_keys(where: str, given: Any, known: Any, needed: Any) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"apply_calibration_config: {where}: got {type(given).__name__}; allowed: a mapping.")
    for key in given:
        if known is not None and key not in known:
            raise ConfigError(f"apply_calibration_config: {where}: unknown key {key!r}; {choices(str(key), known)}.")
    missing = sorted(needed - given.keys())
    if missing:
        raise ConfigError(f"apply_calibration_config: {where}: missing {', '.join(map(repr, missing))}.")


def _layer(name: str, module: nn.Module, entry: Mapping[str, Any]) -> QuantizedLayer:
    layer = QuantizedLayer(name, module)
    formats = {role: _format(f"{name!r}, {role}", entry[role]) for role in LayerFormats.ROLES if role in entry}
    LayerFormats(**formats)  # checks what each role may have
    method = Ptq(PtqOptions())
    for role, wanted in formats.items():
        where, given = f"{name!r}, {role}", entry[role]
        quantizer = method.weight(wanted) if role == "weights" else method.activation(wanted)
        quantizer.format, quantizer.method = wanted, given["method"]
        if quantizer.grid is None or quantizer.grid.signed != given["signed"]:
            raise ConfigError(f"apply_calibration_config: {where}: signed: got {given['signed']!r}; allowed: True.")
        _fix(where, quantizer, given, oriented_weight(name, module) if role == "weights" else None)
        setattr(layer, role, quantizer)
    return layer


def _share_tied(quantized: Quantized) -> None:
    """Let layers with one weight have one quantizer of it, as in the calibrated model."""
    first: dict[int, Quantizer] = {}
    for layer in quantized.layers:
        if layer.weights is not None:
            layer.weights = first.setdefault(id(owned_parameter(layer.name, layer.module)), layer.weights)


def _format(where: str, given: Mapping[str, Any]) -> TensorFormat:
    if not isinstance(given["method"], str) or given["method"] not in quantization_methods:
        known = choices(str(given["method"]), quantization_methods)
        raise ConfigError(f"apply_calibration_config: {where}: method: got {given['method']!r}; {known}.")
    try:
        return TensorFormat.from_dict({key: given[key] for key in FORMAT_KEYS})
    except ConfigError as error:
        raise ConfigError(f"apply_calibration_config: {where}: {error}") from error


def _fix(where: str, quantizer: Quantizer, given: Mapping[str, Any], weight: Tensor | None) -> None:
    """Give a quantizer the steps of its description.

    Raises:
        ConfigError: If they cannot be.
        TargetError: If there are more or fewer than the tensor has.
    """
    assert quantizer.format is not None and quantizer.grid is not None
    if quantizer.format.dynamic:
        if given["scale"] is not None or given["zero_point"] is not None:
            raise ConfigError(f"apply_calibration_config: {where}: scale: allowed: None with dynamic=True.")
        return
    count = 1 if weight is None else quantizer.granularity.num_blocks(weight.shape)
    scale = _numbers(where, "scale", given["scale"], count)
    if not bool((scale > 0).all()):
        raise ConfigError(f"apply_calibration_config: {where}: scale: got a number <= 0; allowed: > 0.")
    zero_point = None
    if (given["zero_point"] is None) != quantizer.grid.symmetric:
        raise ConfigError(f"apply_calibration_config: {where}: zero_point: allowed: None if and only if symmetric.")
    if given["zero_point"] is not None:
        zero_point = _numbers(where, "zero_point", given["zero_point"], count)
        low, high = quantizer.grid.low, quantizer.grid.high
        if not bool(((zero_point >= low) & (zero_point <= high) & (zero_point == zero_point.round())).all()):
            raise ConfigError(f"apply_calibration_config: {where}: zero_point: allowed: ints from {low} to {high}.")
        zero_point = zero_point.to(torch.int32)
    ends = [None if given[end] is None else _numbers(where, end, given[end], count) for end in ("low", "high")]
    if isinstance(quantizer, RangeQuantizer):
        assert weight is not None
        found = quantizer.parameters(weight.detach())
        own = all(_equal(*pair) for pair in zip(found, (scale, zero_point), strict=True))
        quantizer.fix(scale, zero_point, own=own)
    elif isinstance(quantizer, ObservedQuantizer):
        limits = None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
        if limits is not None:
            _check_agreement(where, quantizer, scale, limits)
        quantizer.fix(scale, zero_point, limits)


def _check_agreement(where: str, quantizer: ObservedQuantizer, scale: Tensor, limits: tuple[Tensor, Tensor]) -> None:
    expected, _ = quantizer.grid.parameters(*limits)
    if not torch.allclose(scale, expected, rtol=1e-3):
        raise ConfigError(
            f"apply_calibration_config: {where}: scale: got {scale.tolist()}, but a range from {limits[0].tolist()} to "
            f"{limits[1].tolist()} in {quantizer.num_bits} bits gives {expected.tolist()}. Calibrate again."
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.cpu(), b)


def _numbers(where: str, name: str, given: Any, count: int) -> Tensor:
    real = isinstance(given, list | tuple) and all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in given
    )
    if not real:
        raise ConfigError(f"apply_calibration_config: {where}: {name}: allowed: a list of finite numbers.")
    if len(given) != count:
        raise TargetError(
            f"apply_calibration_config: {where}: {name}: got {len(given)} numbers, but the tensor has {count} steps. "
            "Is it the model that was calibrated?"
        )
    found = torch.tensor(given, dtype=torch.float32)
    if not bool(torch.isfinite(found).all()):
        raise ConfigError(f"apply_calibration_config: {where}: {name}: got a number that float32 does not hold.")
    return found
