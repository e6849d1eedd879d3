"""Fake quantizers on the Linear layers of a model: which layers get one, putting them on, taking them off."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from hf_compress.errors import ConfigError, TargetError, choices
from hf_compress.instruments.adapters import base_layer, check_lora, named_plain_modules
from hf_compress.instruments.attach import attach, attachment_of, detach_if_empty, leaf_kind
from hf_compress.quantization.quantizers import Scheme


def quantizable_linears(model: PreTrainedModel, exclude: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Choose the Linear layers to quantize.

    Args:
        model: Any model of transformers.
        exclude: Regular expressions; a Linear whose name matches one (``re.search``) is left out. None leaves out
            what usually has to stay in floating point: everything outside the base model (the task head), the
            output embeddings, and weights that several modules share (tied embeddings).

    Returns:
        The chosen layers by module name, in the order of the model; a LoRA layer stands for the Linear that merging
        leaves, under its name.

    Raises:
        ConfigError: If a pattern is no regular expression.
        TargetError: If a pattern matches no Linear, a chosen weight is shared, or no Linear is left.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(f"quantization: got {type(model).__name__}; allowed: a transformers PreTrainedModel.")
    linears = {name: module for name, module in named_plain_modules(model) if _is_quantizable(module)}
    if not linears:
        raise TargetError(
            f"quantization: {type(model).__name__} has no nn.Linear; only nn.Linear layers can be quantized, not "
            "Conv1D (GPT-2) or convolutions."
        )
    chosen = _default_choice(model, linears) if exclude is None else _explicit_choice(model, linears, tuple(exclude))
    if not chosen:
        raise TargetError(
            f"quantization: none of the {len(linears)} Linear layers of {type(model).__name__} is left to quantize. "
            "Exclude less; exclude=() takes all of them, the task head included."
        )
    return chosen


def check_fake_quantizable(linears: Mapping[str, nn.Module]) -> None:
    """Check that a fake quantizer can be installed on every given layer.

    Raises:
        TargetError: If a layer has one already, nothing can be attached to it, or its adapter could not be merged
            into what is quantized.
    """
    for name, module in linears.items():
        check_lora(name, module, merged=True)
        leaf_kind(name, module)
        if _is_fake_quantized(module):
            raise TargetError(
                f"quantization: {name!r} has a fake quantizer already, left by an earlier training run. Call detach() "
                "on the QuantizationCallback of that run first."
            )


def install_fake_quantizers(scheme: Scheme, linears: Mapping[str, nn.Module]) -> None:
    """Fake-quantize the weight and the input of every given layer from now on.

    Args:
        scheme: The numbers.
        linears: Layers by name, see ``quantizable_linears``.

    Raises:
        TargetError: See ``check_fake_quantizable``; no layer was changed.
    """
    check_fake_quantizable(linears)
    for name, module in linears.items():
        # The layer inside an adapted one is idle until the adapter is merged and taken off.
        for layer in dict.fromkeys((module, base_layer(module))):
            attachment = attach(name, layer)
            attachment.input_quantizer = attachment.weight_quantizer = scheme


def remove_fake_quantizers(model: nn.Module) -> None:
    """Take every fake quantizer off; gates stay."""
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            attachment.input_quantizer = attachment.weight_quantizer = None
            detach_if_empty(module)


def fake_quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that have a fake quantizer, in the order of the model."""
    return [name for name, module in named_plain_modules(model) if _is_fake_quantized(module)]


def _is_fake_quantized(module: nn.Module) -> bool:
    attachment = attachment_of(module)
    return attachment is not None and attachment.weight_quantizer is not None


def _is_quantizable(module: nn.Module) -> bool:
    # MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear and never calls it; a layer that
    # lost all inputs or outputs has no numbers.
    layer = base_layer(module)
    if not isinstance(layer, nn.Linear) or isinstance(layer, NonDynamicallyQuantizableLinear):
        return False
    return layer.weight.numel() > 0


def _shared_weights(model: nn.Module) -> set[int]:
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {identity for identity, count in owners.items() if count > 1}


def _default_choice(model: PreTrainedModel, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = {id(module) for module in model.base_model.modules()}
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    inside.discard(id(output))
    shared = _shared_weights(model)
    return {n: module for n, module in linears.items() if id(module) in inside and id(module.weight) not in shared}


def _explicit_choice(
    model: PreTrainedModel, linears: dict[str, nn.Module], exclude: tuple[str, ...]
) -> dict[str, nn.Module]:
    excluded: set[str] = set()
    for pattern in exclude:
        try:
            matched = {name for name in linears if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"exclude: {pattern!r} is no regular expression: {error}.") from error
        if not matched:
            known = choices(pattern, {re.sub(r"\.\d+\.", ".N.", name) for name in linears})
            raise TargetError(f"exclude: pattern {pattern!r} matches no Linear of {type(model).__name__}; {known}.")
        excluded |= matched
    chosen = {name: module for name, module in linears.items() if name not in excluded}
    shared = _shared_weights(model)
    for name, module in chosen.items():
        if id(module.weight) in shared:
            raise TargetError(
                f"quantization: the weight of {name!r} is shared with another module (tied embeddings?), which an "
                f"integer weight cannot be. Add {re.escape(name)!r} to exclude, or use exclude=None."
            )
    return chosen
