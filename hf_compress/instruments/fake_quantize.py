"""Which layers of a model can be quantized, and putting quantizers on them and taking them off."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import ConfigError, TargetError, choices
from hf_compress.instruments.adapters import base_layer, check_lora
from hf_compress.instruments.attach import attachment_of, detach_if_empty, leaf_kind, refuse_patched
from hf_compress.instruments.targets import LEAVES, MISSING, check_embedding, owned_parameter, sites, target_of

Owners = dict[int, list[tuple[str, nn.Module]]]
"""Identity of a parameter -> names and modules of all that own it."""


def quantizable_layers(
    model: PreTrainedModel, exclude: Iterable[str] | None = None, targets: Sequence[str] = ("linear",)
) -> dict[str, nn.Module]:
    """Choose the layers to quantize.

    Args:
        model: Any model of transformers.
        exclude: Regular expressions; a layer whose name matches one (``re.search``) is left out. None leaves out
            what usually has to stay in floating point: everything outside the base model (the task head), the
            output embeddings, and layers whose weight another module has, too (tied embeddings).
        targets: Kinds of layers, see ``QuantizationConfig.targets``.

    Returns:
        The chosen layers by name (see ``hf_compress.instruments.targets``), in the order of the model; a LoRA layer
        stands for the Linear that merging leaves, under its name.

    Raises:
        ConfigError: If a pattern is no regular expression.
        TargetError: If a pattern matches no such layer, a chosen weight is shared, or none is left.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(f"quantization: got {type(model).__name__}; allowed: a transformers PreTrainedModel.")
    found = {target: dict(sites(model, target)) for target in targets}
    for target, some in found.items():
        if not some:
            raise TargetError(f"quantization: {type(model).__name__} has no {MISSING[target]} (target {target!r}).")
    together = {name: module for some in found.values() for name, module in some.items()}
    order = {id(module): place for place, module in enumerate(model.modules())}
    layers = dict(sorted(together.items(), key=lambda item: order[id(item[1])]))
    chosen = _default_choice(model, layers) if exclude is None else _explicit_choice(model, layers, tuple(exclude))
    _check_shared(model, chosen, "exclude=None" if exclude is None else f"exclude={list(exclude)!r}")
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
        target = target_of(name, module)
        if target in LEAVES:
            leaf_kind(name, module)
        elif target == "embedding":
            check_embedding(name, module)
        refuse_patched(name, module)
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
            attachment.clear_quantizers()
            detach_if_empty(module)


def is_fake_quantized(module: nn.Module) -> bool:
    """Return whether a module has a fake quantizer."""
    attachment = attachment_of(module)
    return attachment is not None and bool(attachment.quantizers())


def _owners(model: nn.Module) -> Owners:
    owners: Owners = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _default_choice(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = {id(module) for module in model.base_model.modules()}
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    inside.discard(id(output))
    owners = _owners(model)

    def is_shared_layer(name: str, module: nn.Module) -> bool:
        parameter = owned_parameter(name, module)
        return target_of(name, module) in LEAVES and len(owners.get(id(parameter), ())) > 1

    return {n: module for n, module in layers.items() if id(module) in inside and not is_shared_layer(n, module)}


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
    return {name: module for name, module in layers.items() if name not in excluded}


def _check_shared(model: nn.Module, chosen: Mapping[str, nn.Module], exclude: str) -> None:
    """Check that a weight that several modules have is quantized for all of them, as a table of embeddings can be.

    Raises:
        TargetError: If not.
    """
    owners, taken = _owners(model), {id(base_layer(module)) for module in chosen.values()}
    for name, module in chosen.items():
        sharing = owners.get(id(owned_parameter(name, module)), [])
        others = [(other, each) for other, each in sharing if each is not base_layer(module)]
        if not others:
            continue
        if not any(isinstance(each, nn.Embedding) and id(each) in taken for _, each in sharing):
            raise TargetError(
                f"quantization: the weight of {name!r} is shared with another module (tied embeddings?), which an "
                f"integer weight cannot be. Add {re.escape(name)!r} to exclude, or use exclude=None."
            )
        left = next((other for other, each in others if id(each) not in taken), None)
        if left is not None:
            raise TargetError(
                f"quantization: the weight of {name!r} is that of {left!r}, too, which is left in floating point by "
                f"{exclude} or targets. To quantize both alike, use exclude=() or patterns that match neither, and "
                f"targets for both; to quantize neither, add {re.escape(name)!r} and {re.escape(left)!r} to exclude."
            )
