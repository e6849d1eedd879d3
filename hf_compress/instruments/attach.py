"""The one place that changes how a module computes: swap its class for a subclass of its exact class.

A class swap leaves the module tree, parameter names, weight tying and state dicts as they were, and works
under autocast, activation checkpointing, DDP, FSDP2 and torch.compile; parametrizations, wrapper modules and
``.data`` swaps each break at least one of these.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_compress.errors import TargetError
from hf_compress.instruments.adapters import base_layer, effective_weight, is_lora
from hf_compress.instruments.leaf import LEAF_KINDS, LeafKind
from hf_compress.instruments.remake import Changes, remade_linear
from hf_compress.quantization.quantizers import Prepared, Quantizer


class InputGate(Protocol):
    """Returns one factor per input channel, [in_features]; differentiable with respect to the gate."""

    def __call__(self) -> Tensor: ...  # noqa: D102


class ParameterGate(Protocol):
    """Returns what stands in for the parameter ``name`` of the module ``owner`` while another module, or it, runs."""

    owner: nn.Module
    name: str

    def __call__(self, parameter: Tensor) -> Tensor: ...  # noqa: D102


class WeightMask(Protocol):
    """Returns the weight with zeros where it is pruned."""

    def __call__(self, weight: Tensor) -> Tensor: ...  # noqa: D102

    def tensor(self, device: torch.device) -> Tensor:
        """Return the mask, for autograd to check that it is the same in the backward pass."""
        ...


class CallTransform(Protocol):
    """Called instead of a module's forward, with the module, that forward, and the arguments."""

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...  # noqa: D102


@dataclass(eq=False)
class Attachment:
    """What is attached to one module, in the order in which it acts.

    Gates and masks come first, so that quantizers see what a physically smaller layer would see: removed channels
    are zeros in the input and are hidden from the weight's scale, and pruned weights are zeros.
    """

    base: type[nn.Module]
    """The class that the module had before."""

    input_gates: list[InputGate] = field(default_factory=list)
    """Each gives factors [in_features]; the input is multiplied by all of them."""

    recorders: list[Callable[[Tensor], None]] = field(default_factory=list)
    """Watch the input as it comes, before any gate, while the module trains."""

    input_quantizer: Quantizer | None = None
    """Fake-quantizes the gated input, [..., in_features]."""

    weight_mask: WeightMask | None = None
    """Applied to the weight."""

    weight_quantizer: Quantizer | None = None
    """Fake-quantizes the masked weight; it is told which inputs are removed."""

    output_quantizers: list[Quantizer] = field(default_factory=list)
    """Act on the output, one after the other."""

    parameter_gates: list[ParameterGate] = field(default_factory=list)
    """Change parameters while the module runs: the only way into those that are not read by a leaf module."""

    subset: CallTransform | None = None
    """Runs the module on the kept units alone."""

    layer: CallTransform | None = None
    """Mixes what the module returns with what it was given."""

    final_gates: list[Any] = field(default_factory=list)
    """Those gates that a finished run left, because weights alone do not say what is gone."""

    def gates(self) -> list[Any]:
        """Return whatever switches units off."""
        transforms = [each for each in (self.subset, self.layer) if each is not None]
        return [*self.input_gates, *self.parameter_gates, *transforms]

    def is_empty(self) -> bool:
        """Return whether nothing is attached any more."""
        return not (self.acts_on_leaf() or self.parameter_gates or self.subset or self.layer)

    def acts_on_leaf(self) -> bool:
        """Return whether input or weight of a leaf module pass through something."""
        changes_input = bool(self.input_gates) or self.input_quantizer is not None
        return changes_input or bool(self.recorders or self.output_quantizers) or self.changes_weight()

    def changes_weight(self) -> bool:
        """Return whether a leaf module computes with another weight."""
        return self.weight_mask is not None or self.weight_quantizer is not None

    def clear(self) -> None:
        """Take everything off."""
        self.input_gates.clear()
        self.recorders.clear()
        self.parameter_gates.clear()
        self.output_quantizers.clear()
        self.input_quantizer = self.weight_mask = self.weight_quantizer = self.subset = self.layer = None

    def factors(self) -> Tensor | None:
        """Return the product of all input gates, [in_features], or None without gates."""
        product: Tensor | None = None
        for gate in self.input_gates:
            product = gate() if product is None else product * gate()
        return product


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
            return _leaf_forward(self, attachment, *args, **kwargs)
        return attachment.base.forward(self, *args, **kwargs)

    def on_subset(*args: Any, **kwargs: Any) -> Any:
        # Gates have one factor per position of the whole parameter, so they act before a subset is taken.
        with _substituted(attachment.parameter_gates):
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


def _leaf_forward(self: nn.Module, attachment: Attachment, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if self.training:
        for record in attachment.recorders:
            record(x.detach())
    y = _computed(self, attachment, x, *args, **kwargs)
    for quantizer in attachment.output_quantizers:
        y = _quantized(self, quantizer, y, None, {}, "y")
    return y


def _computed(self: nn.Module, attachment: Attachment, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a leaf module with changed input and weight."""
    layer: Any = base_layer(self)
    kind = next(kind for base, kind in LEAF_KINDS.items() if isinstance(layer, base))
    # Autocast casts a weight once, however often it is used, and sums its gradients in the lower precision; a weight
    # that is not changed has to stay the one that is cast.
    autocast = torch.is_autocast_enabled(x.device.type)
    plain = layer is self and kind.is_linear and not (autocast and not attachment.changes_weight())
    fold = plain and attachment.input_quantizer is None and x.numel() >= layer.weight.numel()
    change_x, change_weight = changes = _changes(self, attachment, kind, x, layer.weight, fold)
    if layer is not self and not attachment.changes_weight():
        return attachment.base.forward(self, change_x(x), *args, **kwargs)
    weight = effective_weight(self)
    compute = partial(kind.compute, layer)
    # Autograd keeps an adapter's merged weight anyway; compilers decide themselves what to keep.
    if not plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(change_x(x), change_weight(weight), layer.bias)
    guards = () if attachment.weight_mask is None else (attachment.weight_mask.tensor(x.device),)
    return remade_linear(compute, (x, weight, layer.bias), changes, kind.weight_in_dim, guards)


def _changes(self: nn.Module, attachment: Attachment, kind: LeafKind, x: Tensor, weight: Tensor, fold: bool) -> Changes:
    """Return what is done to input and weight, as it is now: the backward pass does it again.

    Args:
        self: The layer.
        attachment: What is attached to it.
        kind: How it computes.
        x: Its input.
        weight: Its weight.
        fold: Multiply the weight by the gates instead of the input. The products are the same, and it is cheaper
            where there are more tokens than outputs; but a quantizer of the input has to see removed channels as 0.
    """
    factors = attachment.factors()
    mask, for_inputs, for_weights = attachment.weight_mask, attachment.input_quantizer, attachment.weight_quantizer
    for_x = for_weight = removed = None
    if factors is not None and fold:
        for_weight = _broadcast(factors.to(weight.dtype), weight.dim(), kind.weight_in_dim)
    elif factors is not None:
        for_x = _broadcast(factors.to(x.dtype), x.dim(), kind.channel_dim)
    if factors is not None:
        removed = kind.oriented(_broadcast(factors.detach() == 0, weight.dim(), kind.weight_in_dim))
    prepared: dict[str, Prepared] = {}  # steps are small enough to be remembered

    def change_x(x: Tensor) -> Tensor:
        x = x if for_x is None else x * for_x
        return x if for_inputs is None else _quantized(self, for_inputs, x, None, prepared, "x")

    def change_weight(weight: Tensor) -> Tensor:
        weight = weight if for_weight is None else weight * for_weight
        weight = weight if mask is None else mask(weight)
        if for_weights is None:
            return weight
        return kind.oriented(_quantized(self, for_weights, kind.oriented(weight), removed, prepared, "weight"))

    return change_x, change_weight


def _quantized(
    self: nn.Module, quantizer: Quantizer, x: Tensor, removed: Tensor | None, prepared: dict[str, Prepared], key: str
) -> Tensor:
    """Return a tensor on its grid; the first time in a forward pass, it is watched and its step remembered."""
    first = key not in prepared
    collector = quantizer.collector
    if first and collector is not None and (self.training or collector.while_evaluating):
        collector.observe(x.detach())
    if not quantizer.enabled:
        prepared[key] = ()
        return x
    if first:
        prepared[key] = quantizer.prepare(x.detach(), removed)
    return quantizer.fake_quantize(x, removed, prepared[key])


def _broadcast(factors: Tensor, num_dims: int, dim: int) -> Tensor:
    shape = [1] * num_dims
    shape[dim] = -1
    return factors.view(shape)


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


def detach_all(model: nn.Module) -> None:
    """Take everything off every module of ``model``."""
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            attachment.clear()
            detach_if_empty(module)
