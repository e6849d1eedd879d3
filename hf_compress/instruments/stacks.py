"""Stacks of layers: which a model has, which layer a module belongs to, which layers pruning keeps."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.distillation.positions import IGNORED_LABEL
from hf_compress.errors import TrainingError
from hf_compress.instruments.attach import attachment_of


@dataclass(frozen=True)
class Place:
    """Where a module lies in a stack of layers."""

    stack: str
    """"encoder" or "decoder"."""

    layers: str
    """Name of the list of layers."""

    index: int
    """Number of the layer."""

    count: int
    """Number of layers in the list."""


def pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the model of Transformers inside of wrappers such as those of PEFT, DDP and torch.compile.

    Raises:
        TrainingError: If there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TrainingError(
        f"distillation: features were asked for of a {type(model).__name__} that contains no PreTrainedModel. Use a "
        "model of Transformers, or distill logits only."
    )


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module that holds each stack, by its name, "encoder" or "decoder".

    An encoder-decoder has both. Any other model has one, which is a decoder if it generates text or attends to
    earlier positions only; of a model of several modalities that generates text, it is the language model.
    """
    plain: Any = pretrained(model)
    if plain.config.is_encoder_decoder:
        return {"encoder": plain.get_encoder(), "decoder": plain.get_decoder()}
    if plain.can_generate():
        return {"decoder": plain.get_decoder()}
    causal = any(getattr(module, "is_causal", False) for module in plain.modules())
    return {"decoder" if causal else "encoder": plain}


def places(model: nn.Module) -> dict[int, tuple[str, Place]]:
    """Return name and place of every module inside of a list of layers, by identity.

    Lists may lie in each other (the parts of a layer of T5; the blocks of a stage of Swin): the outermost one counts.
    A module of several stacks belongs to the smallest.
    """
    found: dict[int, tuple[str, Place]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for stack, root in sorted(stacks_of(model).items(), key=lambda item: -len(list(item[1].modules()))):
        for name, layers in outermost_lists(root, names[id(root)]):
            for index, layer in enumerate(layers):
                place = Place(stack, name, index, len(layers))
                found.update(
                    {id(module): (inner, place) for inner, module in layer.named_modules(prefix=f"{name}.{index}")}
                )
    return found


def outermost_lists(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules in ``root`` that lie in no other one, with their names."""
    if isinstance(root, nn.ModuleList):
        yield prefix, root
        return
    for name, child in root.named_children():
        yield from outermost_lists(child, f"{prefix}.{name}" if prefix else name)


def recorded(model: nn.Module, output: str) -> dict[int, Any]:
    """Return what the model's classes declare to record for an output, such as "cross_attentions".

    Returns:
        For each module, by identity and in order, whether a list of hidden states begins with the input of the first.
    """
    found: dict[int, bool] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        declared = (part._can_record_outputs or {}).get(output, [])
        for each in declared if isinstance(declared, list) else [declared]:
            kind = getattr(each, "target_class", each)
            within = f".{(getattr(each, 'layer_name', None) or '').strip('.')}.".replace("..", ".")
            for name, module in part.named_modules():
                if isinstance(kind, type) and isinstance(module, kind) and within in f".{name}.":
                    found.setdefault(id(module), getattr(each, "capture_initial_hidden_state", True))
    return found


def kept_layers(model: nn.Module, stack: str, num_layers: int) -> list[bool]:
    """Return which layers of a stack the attached gates of structure "layers" keep; all without gates.

    Where a layer is a stage of several gated ones, it is kept if one of them is. Gates live on the model's device,
    which is waited for: ask when masks have changed, not in each step.

    Args:
        model: A model that gates may be attached to.
        stack: "encoder" or "decoder".
        num_layers: Number of layers of the stack.

    Raises:
        TrainingError: If the gated layers are not those of the stack.
    """
    gates: dict[int, list[bool]] = defaultdict(list)
    known = places(model)
    values: dict[int, list[float]] = {}
    for module in model.modules():
        attachment = attachment_of(module)
        mix: Any = attachment.layer if attachment is not None else None
        if mix is None or id(module) not in known or known[id(module)][1].stack != stack:
            continue
        name, place = known[id(module)]
        if place.count != num_layers:
            raise TrainingError(
                f"distillation: {name!r} is pruned as one of {place.count} layers, but the features of the {stack} "
                f"come from {num_layers}. Leave 'layers' out of the structures to prune, or match logits only."
            )
        if id(mix.value) not in values:
            values[id(mix.value)] = mix.value.detach().tolist()
        gates[place.index].append(values[id(mix.value)][mix.index] != 0)
    return [any(gates.get(index, [True])) for index in range(num_layers)]


def position_mask(model: nn.Module, stack: str, inputs: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return which positions of a stack hold something, bool, [batch, length], on the device of ``like``.

    Encoders and decoders of one stack: ``attention_mask``, and all positions without one, as for images; for speech,
    the mask of samples becomes one of frames as the model itself does it. Decoders of two: ``decoder_attention_mask``,
    or else where labels are not -100, or else all.

    Args:
        model: The model that computed ``like``.
        stack: "encoder" or "decoder".
        inputs: What the model was called with.
        like: A feature of the stack, [batch, length, width].

    Raises:
        TrainingError: If the mask has another shape.
    """
    plain, (batch, length) = pretrained(model), like.shape[:2]
    name = "attention_mask"
    if stack == "decoder" and plain.config.is_encoder_decoder:
        name = "decoder_attention_mask"
        labels = inputs.get("labels")
        if inputs.get(name) is None and isinstance(labels, Tensor) and labels.shape == (batch, length):
            return (labels != IGNORED_LABEL).to(like.device)
    mask = inputs.get(name)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=like.device)
    if isinstance(mask, Tensor) and mask.dim() == 3 and mask.shape[0] * mask.shape[1] == batch:
        mask = mask.flatten(0, 1)  # several texts in each example: multiple choice
    fitted = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if fitted is not None and fitted.shape[1] > length:
        fitted = _frames(plain, fitted, length)
    if fitted is None or fitted.shape != (batch, length):
        given = f"has shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise TrainingError(
            f"distillation: {name} {given}, but the {stack} of {type(plain).__name__} has features of shape "
            f"{list(like.shape)}. Give one value for each position, [{batch}, {length}], or distill logits only."
        )
    return fitted.to(like.device).bool()


def _frames(model: PreTrainedModel, mask: Tensor, length: int) -> Tensor | None:
    """Return the mask of frames for one of samples, or None if the model cannot say."""
    parts: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        if hasattr(part, "_get_feature_vector_attention_mask"):
            frames: Tensor = part._get_feature_vector_attention_mask(length, mask)
            return frames
        if hasattr(part, "_get_feat_extract_output_lengths"):
            ends = part._get_feat_extract_output_lengths(mask.sum(dim=-1))
            if isinstance(ends, Sequence):  # some models return the lengths before pooling too
                ends = ends[-1]
            within: Tensor = torch.arange(length, device=mask.device) < ends.unsqueeze(-1)
            return within
    return None
