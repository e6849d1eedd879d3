"""Masks on single weights while training: a pruned weight takes no part, whatever the optimizer does to it.

The mask acts in the forward pass. Zeroing weights after each step instead would let momentum and weight decay bring
them back in between, and would need the optimizer's cooperation.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hf_compress.errors import TargetError
from hf_compress.instruments.adapters import base_layer, check_lora, is_lora
from hf_compress.instruments.attach import attach, attachment_of, detach_if_empty, find_leaf_kind, refuse_patched
from hf_compress.instruments.attachment import Attachment
from hf_compress.instruments.sharded import zero_where


class ElementMask:
    """The mask of one parameter: bool, of the parameter's shape, True = keep.

    Pruned weights are exactly zero in the forward pass; fake quantizers come after the mask, so they neither
    influence the scale nor leave zero. The tensor belongs to whoever made the mask, never to the model: it is in no
    state dict, and DDP, which broadcasts all buffers at every forward pass, does not see it.

    A weight that several modules share is masked in this one alone.

    Args:
        name: The module's name, for messages.
        module: Any module; Linear, Conv1D and convolutions are masked where they use their weight, a LoRA layer where
            it uses the weight that merging will leave. Everything else sees the masked parameter while it runs.
        parameter: Name inside the module, dotted for a parameter of a part that the module never calls (the
            ``out_proj.weight`` of PyTorch's attention).
        straight_through: Let the gradient reach pruned weights, for methods where they may come back.

    Raises:
        TargetError: If the module lacks the parameter, never uses it itself, was patched or has an adapter that is
            not understood, or if there is a mask already.
    """

    def __init__(
        self, name: str, module: nn.Module, parameter: str = "weight", *, straight_through: bool = False
    ) -> None:
        self.name = f"{name}.{parameter}"
        self.module = module
        self.straight_through = straight_through
        path, _, self._attribute = parameter.rpartition(".")
        self._owner = base_layer(module).get_submodule(path)
        self._on_leaf = parameter == "weight" and find_leaf_kind(module) is not None
        self._check(name)
        self._keep = torch.ones_like(self._parameter(), dtype=torch.bool, requires_grad=False)
        # The layer inside an adapted one is idle until the adapter is merged and taken off.
        self._modules = list(dict.fromkeys((module, base_layer(module))))
        self._gate = _ParameterMask(self._owner, self._attribute, self)
        for each in self._modules:
            attachment = attach(name, each)
            if self._on_leaf:
                attachment.weight_mask = self
            else:
                attachment.parameter_gates.append(self._gate)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where it is pruned."""
        keep = self.tensor(weight.device)
        if self.straight_through:
            masked: Tensor = _StraightThrough.apply(weight, keep)  # type: ignore[no-untyped-call]
            return masked
        return _masked(weight, keep)

    def tensor(self, device: torch.device | None = None) -> Tensor:
        """Return the mask, moved for good to ``device`` if one is given."""
        if device is not None and self._keep.device != device:
            self._keep = self._keep.to(device)
        return self._keep

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Keep the weights where ``mask`` is True, from now on; in place, so that nothing is compiled again.

        Raises:
            TargetError: If it is not bool or of another shape.
        """
        if mask.dtype != torch.bool or mask.shape != self._keep.shape:
            raise TargetError(
                f"mask of {self.name!r}: got {mask.dtype} {list(mask.shape)}; allowed: torch.bool "
                f"{list(self._keep.shape)}, True = keep."
            )
        self._keep.copy_(mask)

    def fold(self) -> None:
        """Zero the pruned weights themselves: the model computes the same without the mask. Collective under FSDP.

        Raises:
            TargetError: If an adapter would still be added to the zeros.
        """
        if is_lora(self.module) and not self.module.merged:
            raise TargetError(
                f"mask of {self.name!r}: zeros in the base weight would not be zeros once its adapter is added. Merge "
                "the adapter first (merge_and_unload), then fold."
            )
        zero_where(self._parameter(), ~self._keep)

    def remove(self) -> None:
        """Take the mask off."""
        for each in self._modules:
            attachment = attach(self.name, each)
            if attachment.weight_mask is self:
                attachment.weight_mask = None
            if self._gate in attachment.parameter_gates:
                attachment.parameter_gates.remove(self._gate)
            detach_if_empty(each)

    def _parameter(self) -> Tensor:
        parameter: Tensor = self._owner._parameters[self._attribute]  # type: ignore[assignment]
        return parameter

    def _check(self, name: str) -> None:
        refuse_patched(name, self.module)
        if self._on_leaf:
            check_lora(name, self.module, merged=True)
        if self._owner._parameters.get(self._attribute) is None:
            has = [each for each, _ in self.module.named_parameters()]
            raise TargetError(f"mask of {self.name!r}: there is no such parameter; {name!r} has {has}.")
        if isinstance(base_layer(self.module), NonDynamicallyQuantizableLinear):
            raise TargetError(
                f"mask of {self.name!r}: PyTorch's attention takes this weight and never calls the module, so a mask "
                "there would have no effect. Mask 'out_proj.weight' of the attention module."
            )
        attachment = attachment_of(self.module)
        if attachment is not None and self._is_taken(attachment):
            raise TargetError(f"mask of {self.name!r}: there is one already; call remove() on it first.")

    def _is_taken(self, attachment: Attachment) -> bool:
        here = self._owner, self._attribute
        gates: list[Any] = [gate for gate in attachment.parameter_gates if isinstance(gate, _ParameterMask)]
        others = [(gate.owner, gate.name) for gate in gates]
        return attachment.weight_mask is not None if self._on_leaf else here in others


class _ParameterMask:
    """Masks a parameter that is not read by a leaf module."""

    def __init__(self, owner: nn.Module, name: str, mask: ElementMask) -> None:
        self.owner = owner
        self.name = name
        self.mask = mask

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.mask(parameter)


class _StraightThrough(torch.autograd.Function):
    """Masks forward, passes the gradient on unmasked, and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor) -> Tensor:
        return _masked(weight, keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _masked(weight: Tensor, keep: Tensor) -> Tensor:
    # Four times as fast on a CPU as weight * keep, masked_fill and where, whose bool operands are not vectorized.
    return weight * keep.view(torch.uint8)
