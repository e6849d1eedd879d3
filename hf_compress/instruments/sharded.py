"""FSDP version 2 between events: parameters are sharded over the processes, modules have other classes and hooks.

Forward passes see whole parameters, so gates and fake quantizers need nothing of this; whatever reads or writes
parameters in between does. All functions that gather are collective: every process has to call them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_compress.instruments.attach import own_class

_FSDP = FSDPModule.__module__


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP version 2 has sharded the model or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free the gathered copies that evaluation leaves in the modules: to change those would change nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def zero(parameter: Tensor, dim: int, positions: Tensor) -> None:
    """Set ``positions`` along ``dim`` to zero, in place."""
    positions = positions.to(parameter.device)
    _change_in_place(parameter, lambda tensor: tensor.index_fill_(dim, positions, 0.0))


def zero_where(parameter: Tensor, pruned: Tensor) -> None:
    """Set a parameter to zero where ``pruned``, a bool tensor of its whole shape, is True, in place."""
    pruned = pruned.to(parameter.device)
    _change_in_place(parameter, lambda tensor: tensor.masked_fill_(pruned, 0.0))


def scale(parameter: Tensor, dim: int, factors: Tensor) -> None:
    """Multiply a parameter along ``dim`` by ``factors``, one for each position, in place."""
    shape = [1] * parameter.dim()
    shape[dim] = -1
    factors = factors.to(parameter.device, parameter.dtype).view(shape)
    _change_in_place(parameter, lambda tensor: tensor.mul_(factors))


def add_in_place(parameter: Tensor, change: Tensor) -> None:
    """Add ``change``, of the parameter's whole shape, in place."""
    change = change.to(parameter.device, parameter.dtype)
    _change_in_place(parameter, lambda tensor: tensor.add_(change))


@torch.no_grad()
def clamp(parameter: Tensor, low: float, high: float) -> None:
    """Keep a parameter's entries within ends, in place; not collective."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.clamp_(low, high)


@torch.no_grad()
def _change_in_place(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    if not isinstance(parameter, DTensor):
        change(parameter)
        return
    changed = change(parameter.full_tensor())
    mine = distribute_tensor(changed, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(mine.to_local())


@contextmanager
def unsharded(model: nn.Module, *, weights: bool) -> Iterator[None]:
    """Let a sharded model be the plain one, with its own classes and without FSDP's hooks, while the context is open.

    Args:
        model: Any model; nothing changes for one that is not sharded.
        weights: Whether its parameters are gathered; otherwise they are on the meta device.
    """
    if not is_sharded(model):
        yield
        return
    reshard(model)
    modules = list(model.modules())
    saved = [(module, type(module), dict(module.__dict__)) for module in modules]
    parameters: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in modules:
        _as_without_fsdp(module)
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = _replacement(parameter, weights)
                module._parameters[name] = parameters[id(parameter)]
    try:
        yield
    finally:
        for module, own, attributes in saved:
            module.__class__ = own
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _replacement(parameter: DTensor, weights: bool) -> nn.Parameter:
    if weights:
        data = parameter.full_tensor().detach()
    else:
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _as_without_fsdp(module: nn.Module) -> None:
    """Swap the class, and give the module dictionaries of its own without what FSDP put there."""
    module.__class__ = own_class(module)
    for name, value in list(module.__dict__.items()):
        # Its states, by the function that made them; and methods wrapped by register_fsdp_forward_method.
        if _is_fsdps(value) or (isinstance(value, dict) and any(_is_fsdps(key) for key in value)):
            del module.__dict__[name]
        elif name.endswith("hooks") and isinstance(value, dict):
            module.__dict__[name] = type(value)((key, hook) for key, hook in value.items() if not _is_fsdps(hook))
    module.__dict__["_parameters"] = dict(module._parameters)


def _is_fsdps(value: Any) -> bool:
    hook = getattr(value, "hook", value)  # state dict hooks are wrapped once more
    function = getattr(hook, "__func__", hook)
    # Wrapped functions take over the name of the module whose function they wrap, but not its global variables.
    defined_in = (getattr(function, "__module__", ""), getattr(function, "__globals__", {}).get("__name__", ""))
    return callable(hook) and any(str(name).startswith(_FSDP) for name in defined_in)


def first_not_finite(model: nn.Module) -> str | None:
    """Return the name of a parameter with entries that are not finite, or None. Collective under FSDP."""
    found = [name for name, each in model.named_parameters() if not bool(whole(each.detach()).isfinite().all())]
    return found[0] if found else None
