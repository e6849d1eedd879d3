"""PEFT adapters: a model seen without them, and an adapted layer seen as the layer that merging will leave.

Names are those of the model without adapters, where PEFT's wrappers stand for what they wrap: masks and quantized
layers found while adapters train are those of the merged model.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import TargetError
from hf_compress.graph.groups import ParameterSlice


def has_adapters(model: nn.Module) -> bool:
    """Return whether any layer has a PEFT adapter or a trained copy made by PEFT."""
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def without_wrapper(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, adapters included; anything else itself."""
    return model.get_base_model() if isinstance(model, PeftModel | PeftMixedModel) else model


def plain_view(model: PreTrainedModel) -> PreTrainedModel:
    """Return a module tree without adapters that shares all tensors with ``model``."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, memo)
    view.__dict__.pop("forward", None)  # mixed precision puts one there that is bound to the original
    _unwrap(view)
    return view


def merge_in_place(model: PreTrainedModel) -> None:
    """Merge all active adapters into the weights and take PEFT's wrappers off.

    Raises:
        TargetError: If merging gives numbers that are not finite, or an adapter cannot be merged; the model is then
            partly merged.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except (ValueError, NotImplementedError) as error:
                raise TargetError(f"the adapter of {name!r} cannot be merged: {error}") from error
    _unwrap(model)
    model._hf_peft_config_loaded = False
    model.__dict__.pop("peft_config", None)


def named_plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside ``model`` under their names without adapters, adapted layers in place of their base."""
    seen: set[int] = set()

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in parent.named_children():
            module = _unwrapped(child)
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield f"{prefix}{name}", module
            if not isinstance(module, BaseTunerLayer):
                yield from walk(module, f"{prefix}{name}.")

    return walk(model, "")


def is_lora(module: nn.Module) -> bool:
    """Return whether the module is a LoRA layer around a Linear or Conv1D."""
    return isinstance(module, LoraLinear)


def check_lora(name: str, module: nn.Module, *, merged: bool = False) -> None:
    """Check that gates and fake quantizers understand the adapter of a layer.

    Args:
        name: The layer's name, for messages.
        module: The layer; nothing is asked of layers without adapter.
        merged: The layer will compute with the merged weight.

    Raises:
        TargetError: For adapters other than plain LoRA; with ``merged``, for dropout too, which would do nothing.
    """
    if not isinstance(module, BaseTunerLayer):
        return
    if not isinstance(module, LoraLinear):
        problem = f"is a {type(module).__module__}.{type(module).__name__}"
    elif module.lora_variant:
        problem = "uses DoRA or another variant of LoRA"
    elif any(module.lora_bias.values()):
        problem = "has lora_bias"
    elif merged and any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
        problem = "has lora_dropout, which would have no effect: the merged weight is what is quantized"
    else:
        return
    dropout = " with lora_dropout=0" if merged else ""
    raise TargetError(
        f"module {name!r}: its adapter {problem}; allowed: plain LoRA on Linear and Conv1D layers{dropout}. Take the "
        "layer out of target_modules, exclude it, or merge the adapters first (merge_and_unload)."
    )


def effective_weight(module: nn.Module) -> Tensor:
    """Return the weight that merging would leave: W + scaling * B A for LoRA (Hu et al. 2021, arXiv:2106.09685).

    Differentiable; computed in full precision under autocast, as merging does.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not isinstance(module, LoraLinear) or module.merged or module.disable_adapters:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                weight = (weight + module.get_delta_weight(adapter)).to(weight.dtype)
    return weight


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer inside an adapted layer; any other module itself."""
    if not isinstance(module, BaseTunerLayer):
        return module
    base: nn.Module = module.get_base_layer()
    return base


def adapter_slices(module: nn.Module, part: ParameterSlice, weight_in_dim: int) -> Iterator[tuple[nn.Module, int]]:
    """Yield the LoRA factors, each with the dimension of its weight along which the units of a weight's slice lie.

    Args:
        module: The layer that owns ``part``.
        part: A slice of its weight or bias.
        weight_in_dim: The dimension of the weight that is contracted with the input.
    """
    if not isinstance(module, LoraLinear) or part.parameter.rpartition(".")[2] != "weight":
        return
    # A reads the layer's inputs, [r, in]; B makes its outputs, [out, r].
    factors, dim = (module.lora_A, 1) if part.dim == weight_in_dim else (module.lora_B, 0)
    for factor in factors.values():
        yield factor, dim


def _unwrap(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        plain = base_layer(_unwrapped(child))
        if plain is not child:
            setattr(module, name, plain)
        _unwrap(plain)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what PEFT's wrapper of a whole module computes with: the trained copy, or the adapted layer."""
    inner: Any = module
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        inner = module.modules_to_save[active[0]] if active else module.original_module
    elif isinstance(module, AuxiliaryTrainingWrapper):
        inner = module.token_adapter
    result: nn.Module = inner
    return result
