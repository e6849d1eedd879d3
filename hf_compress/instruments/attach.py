"""The one place that changes how a module computes: swap its class for a subclass of its exact class.

A class swap leaves the module tree, parameter names, weight tying and state dicts as they were, and works
under autocast, activation checkpointing, DDP, FSDP2 and torch.compile; parametrizations, wrapper modules and
``.data`` swaps each break at least one of these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_compress.errors import TargetError
from hf_compress.graph.capture import see_without
from hf_compress.instruments.adapters import base_layer, is_lora
from hf_compress.instruments.attachment import Attachment, ParameterGate
from hf_compress.instruments.leaf import LEAF_KINDS, LeafKind
from hf_compress.instruments.leaf_forward import leaf_forward
from hf_compress.instruments.removed import forget_removed

_ATTRIBUTE = "_hf_compress_attachment"
_swapped: dict[type[nn.Module], type[nn.Module]] = {}


def attach(name: str, module: nn.Module) -> Attachment:
    """Return the module's attachment, swapping its class first if it has none.

    Args:
        name: The module's name, for messages.
        module: Any module; input gates and transforms need one of ``LEAF_KINDS``, see ``leaf_kind``.

    Raises:
        TargetError: If the module's forward was replaced on the instance.
    """
    current = attachment_of(module)
    if current is not None:
        return current
    refuse_patched(name, module)
    module.__dict__[_ATTRIBUTE] = Attachment(type(module))
    module.__class__ = _subclass(type(module))
    attachment: Attachment = module.__dict__[_ATTRIBUTE]
    return attachment


def attachment_of(module: nn.Module) -> Attachment | None:
    """Return what is attached to the module, or None."""
    return module.__dict__.get(_ATTRIBUTE)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class as it is without anything attached and without FSDP, which swaps classes too."""
    swapped = _swapped.values()
    bases: tuple[Any, ...] = type(module).__mro__
    own: type[nn.Module] = next(each for each in bases if each not in swapped and not issubclass(each, FSDPModule))
    return own


def detach_if_empty(module: nn.Module) -> None:
    """Give the module the class back that it had, once nothing is attached to it.

    Where FSDP has put a class of its own on top since, both stay; an empty attachment changes nothing.
    """
    attachment = attachment_of(module)
    if attachment is None or not attachment.is_empty():
        return
    if type(module) is _swapped[attachment.base]:
        module.__class__ = attachment.base
    if not isinstance(module, _swapped[attachment.base]):
        del module.__dict__[_ATTRIBUTE]


def leaf_kind(name: str, module: nn.Module) -> LeafKind:
    """Return how the module computes.

    Raises:
        TargetError: If the class is unknown, overrides the known forward, or was patched on the instance.
    """
    refuse_patched(name, module)
    kind = find_leaf_kind(module)
    if kind is None:
        known = ", ".join(base.__name__ for base in LEAF_KINDS)
        raise TargetError(
            f"module {name!r}: cannot attach to {type(module).__name__}; allowed: {known} with their own forward."
        )
    return kind


def find_leaf_kind(module: nn.Module) -> LeafKind | None:
    """Return how the module computes, or None if it is not of a known class with that class's own forward.

    A LoRA layer computes like the layer inside it.
    """
    own = own_class(base_layer(module)) if is_lora(module) else own_class(module)
    return next((kind for base, kind in LEAF_KINDS.items() if own.forward is base.forward), None)


def refuse_patched(name: str, module: nn.Module) -> None:
    """Check that the module's class decides how it computes.

    Raises:
        TargetError: If its forward was replaced on the instance.
    """
    if "forward" in module.__dict__:
        raise TargetError(
            f"module {name!r}: its forward was replaced on the instance (device_map hooks do this), so nothing can "
            "be attached to it. Load the model without device_map, or remove the hooks first."
        )


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    attachment: Attachment = self.__dict__[_ATTRIBUTE]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if attachment.acts_on_leaf():
            return leaf_forward(self, attachment, *args, **kwargs)
        return attachment.base.forward(self, *args, **kwargs)

    def on_subset(*args: Any, **kwargs: Any) -> Any:
        # Gates have one factor per position of the whole parameter, so they act before a subset is taken.
        with _substituted([*attachment.parameter_gates, *attachment.parameter_quantizers]):
            if attachment.subset is None:
                return forward(*args, **kwargs)
            return attachment.subset(self, forward, args, kwargs)

    return on_subset(*args, **kwargs) if attachment.layer is None else attachment.layer(self, on_subset, args, kwargs)


@contextmanager
def _substituted(gates: list[ParameterGate]) -> Iterator[None]:
    """Let modules see changed parameters; the dictionary entries are swapped, so that nothing else does."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for gate in gates:
            parameters: dict[str, Any] = gate.owner._parameters
            saved.append((parameters, gate.name, parameters[gate.name]))
            parameters[gate.name] = gate(parameters[gate.name])
        yield
    finally:
        for parameters, name, value in reversed(saved):
            parameters[name] = value


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _swapped:
        name = f"Instrumented_{base.__module__.replace('.', '_')}_{base.__name__}"
        # A module-level name keeps instances picklable.
        globals()[name] = _swapped[base] = type(name, (base,), {"forward": _forward, "__module__": __name__})
    return _swapped[base]


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Let every module compute as if nothing were attached, while the context is open."""
    attached = [(module, type(module), attachment_of(module)) for module in model.modules()]
    swapped = [(module, own, attachment) for module, own, attachment in attached if attachment is not None]
    for module, own, attachment in swapped:
        if own is _swapped[attachment.base]:
            module.__class__ = attachment.base
        module.__dict__[_ATTRIBUTE] = Attachment(attachment.base)
    try:
        yield
    finally:
        for module, own, attachment in swapped:
            module.__class__ = own
            module.__dict__[_ATTRIBUTE] = attachment


see_without(suspended)


def detach_all(model: nn.Module) -> None:
    """Take everything off every module of ``model``."""
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            attachment.clear()
            detach_if_empty(module)
        forget_removed(module)
