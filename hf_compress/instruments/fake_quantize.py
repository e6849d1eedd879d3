"""Which layers of a model can be quantized, and putting quantizers on them and taking them off."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import ConfigError, TargetError, choices
from hf_compress.instruments.adapters import base_layer, check_lora, named_plain_modules
from hf_compress.instruments.attach import attachment_of, detach_if_empty, leaf_kind

TARGETS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear, Conv1D),
    "convolution": (nn.Conv1d, nn.Conv2d),
}
"""Kind of module -> its classes."""


def quantizable_layers(
    model: PreTrainedModel, exclude: Iterable[str] | None = None, targets: Sequence[str] = ("linear",)
) -> dict[str, nn.Module]:
    """Choose the layers to quantize.

    Args:
        model: Any model of transformers.
        exclude: Regular expressions; a layer whose name matches one (``re.search``) is left out. None leaves out
            what usually has to stay in floating point: everything outside the base model (the task head), the
            output embeddings, and weights that several modules share (tied embeddings).
        targets: Kinds of layers, see ``TARGETS``.

    Returns:
        The chosen layers by module name, in the order of the model; a LoRA layer stands for the Linear that merging
        leaves, under its name.

    Raises:
        ConfigError: If a pattern is no regular expression.
        TargetError: If a pattern matches no such layer, a chosen weight is shared, or none is left.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(f"quantization: got {type(model).__name__}; allowed: a transformers PreTrainedModel.")
    classes = tuple(each for target in targets for each in TARGETS[target])
    layers = {name: module for name, module in named_plain_modules(model) if _is_quantizable(module, classes)}
    for target in targets:
        if not any(isinstance(base_layer(module), TARGETS[target]) for module in layers.values()):
            names = " or ".join(each.__name__ for each in TARGETS[target])
            raise TargetError(f"quantization: {type(model).__name__} has no {names} (target {target!r}).")
    chosen = _default_choice(model, layers) if exclude is None else _explicit_choice(model, layers, tuple(exclude))
    if not chosen:
        raise TargetError(
            f"quantization: none of the {len(layers)} layers of {type(model).__name__} that could be quantized is "
            "left. Exclude less; exclude=() takes all of them, the task head included."
        )
    return chosen


def check_fake_quantizable(layers: Mapping[str, nn.Module]) -> None:
    """Check that a fake quantizer can be installed on every given layer.

    Raises:
        TargetError: If a layer has one already, nothing can be attached to it, or its adapter could not be merged
            into what is quantized.
    """
    for name, module in layers.items():
        check_lora(name, module, merged=True)
        leaf_kind(name, module)
        if is_fake_quantized(module):
            raise TargetError(
                f"quantization: {name!r} has a fake quantizer already, left by calibrate or an earlier training run. "
                "Call detach() first: on what calibrate returned, or on the QuantizationCallback of that run."
            )


def remove_fake_quantizers(model: nn.Module) -> None:
    """Take every fake quantizer off; gates stay."""
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            attachment.input_quantizer = attachment.weight_quantizer = None
            attachment.output_quantizers.clear()
            detach_if_empty(module)


def fake_quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that have a fake quantizer, in the order of the model."""
    return [name for name, module in named_plain_modules(model) if is_fake_quantized(module)]


def is_fake_quantized(module: nn.Module) -> bool:
    """Return whether a module has a fake quantizer."""
    attachment = attachment_of(module)
    if attachment is None:
        return False
    given = (attachment.input_quantizer, attachment.weight_quantizer, *attachment.output_quantizers)
    return any(each is not None for each in given)


def _is_quantizable(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    # MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear and never calls it; a layer that
    # lost all inputs or outputs has no numbers.
    layer = base_layer(module)
    if not isinstance(layer, classes) or isinstance(layer, NonDynamicallyQuantizableLinear):
        return False
    return layer.get_parameter("weight").numel() > 0


def _shared_weights(model: nn.Module) -> set[int]:
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {identity for identity, count in owners.items() if count > 1}


def _default_choice(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = {id(module) for module in model.base_model.modules()}
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    inside.discard(id(output))
    shared = _shared_weights(model)
    return {n: module for n, module in layers.items() if id(module) in inside and id(module.weight) not in shared}


def _explicit_choice(
    model: PreTrainedModel, layers: dict[str, nn.Module], exclude: tuple[str, ...]
) -> dict[str, nn.Module]:
    excluded: set[str] = set()
    for pattern in exclude:
        try:
            matched = {name for name in layers if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"exclude: {pattern!r} is no regular expression: {error}.") from error
        if not matched:
            known = choices(pattern, {re.sub(r"\.\d+\.", ".N.", name) for name in layers})
            raise TargetError(
                f"exclude: pattern {pattern!r} matches no layer of {type(model).__name__} that could be quantized; "
                f"{known}."
            )
        excluded |= matched
    chosen = {name: module for name, module in layers.items() if name not in excluded}
    shared = _shared_weights(model)
    for name, module in chosen.items():
        if id(module.weight) in shared:
            raise TargetError(
                f"quantization: the weight of {name!r} is shared with another module (tied embeddings?), which an "
                f"integer weight cannot be. Add {re.escape(name)!r} to exclude, or use exclude=None."
            )
    return chosen
