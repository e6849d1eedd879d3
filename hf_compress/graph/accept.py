"""Which models can be analyzed, and what to do about the others."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune

from hf_compress.errors import GraphError


def check_model(model: Any, example_inputs: Any) -> None:
    """Check that a model is plain: no wrapper, no adapters, no integer weights.

    Raises:
        GraphError: If it is not; the message says how to get the plain one.
    """
    remedy = remedy_for(model)
    if remedy is not None:
        raise GraphError(f"{type(model).__name__} cannot be analyzed: {remedy}")
    if not isinstance(example_inputs, Mapping | None):
        raise GraphError(
            f"example_inputs: got {type(example_inputs).__name__}; allowed: a dict of keyword arguments for "
            f"{type(model).__name__}.forward, or None to make them from the config."
        )


def remedy_for(model: Any) -> str | None:
    """Return what has to be done before a model can be analyzed, or None if nothing has."""
    if not isinstance(model, nn.Module):
        return "it is no model. Load one with from_pretrained."
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "it wraps a model for several devices. Pass model.module."
    if hasattr(model, "_orig_mod"):
        return "it is compiled. Pass the model that was given to torch.compile (model._orig_mod)."
    adapted = next((name for name, m in model.named_modules() if type(m).__module__.startswith("peft.")), None)
    if adapted is not None:
        where = f", the first at {adapted!r}" if adapted else ""
        return (
            f"it has PEFT adapters{where}; what is removed from base weights would not fit them. Merge them first: "
            "model = model.merge_and_unload()."
        )
    hooked = next((name for name, m in model.named_modules() if any(map(_is_torch_mask, _hooks(m)))), None)
    if hooked is not None:
        return (
            f"torch.nn.utils.prune masks a weight of {hooked!r}, which makes it a result instead of a parameter. Make "
            "the masks permanent first: prune.remove(module, name)."
        )
    sharded = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        return (
            f"{sharded!r} is spread over several processes (a DTensor). Save the model and load it in one process; "
            "after training with FSDP version 2, shrink(trainer) gathers it by itself."
        )
    quantized = next((name for name, p in model.named_parameters() if _is_quantized(p)), None)
    if quantized is not None:
        return (
            f"{quantized!r} is quantized; floating-point weights are needed. Shrink the original checkpoint first and "
            "quantize the result."
        )
    return None


def _hooks(module: nn.Module) -> Iterable[Any]:
    return module._forward_pre_hooks.values()


def _is_torch_mask(hook: Any) -> bool:
    return isinstance(hook, prune.BasePruningMethod)


def _is_quantized(parameter: torch.Tensor) -> bool:
    return type(parameter.data).__module__.startswith("torchao.")
