"""A linear layer whose changed input and changed weight are made again in the backward pass instead of being kept.

What gates, masks and fake quantizers make of an input or a weight is as large as the input or the weight. Autograd
would keep all of it between forward and backward; the originals, from which it is cheap to make it again, are there
anyway: the plain model keeps them too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Changes = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""What makes the input and the weight that are used of those that are there, each in the same shape."""


def remade_linear(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    operands: tuple[Tensor, Tensor, Tensor | None],
    changes: Changes,
    weight_in_dim: int,
    guards: tuple[Tensor, ...] = (),
) -> Tensor:
    """Return what ``compute`` makes of the changed operands, bit for bit, its gradients too.

    The changes are differentiated by autograd as always, so they should keep no large tensors for that either. They
    must give the same numbers whenever they are called, with autocast or without it.

    Args:
        compute: (input, weight, bias) -> output, a linear layer.
        operands: Input [..., in_features]; weight, two-dimensional; bias [out_features].
        changes: For input and weight.
        weight_in_dim: The dimension of the weight that is contracted with the input.
        guards: What the changes read and must not be changed in place before the backward pass; autograd checks it.
    """
    (x, weight, bias), (change_x, change_weight) = operands, changes
    made_x, made_weight = change_x(x), change_weight(weight)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _apply(made_x, made_weight, bias, x, weight, compute, changes, weight_in_dim, guards)
    dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    casts = _cast(change_x, dtype), _cast(change_weight, dtype)
    with torch.autocast(device, enabled=False):
        return _apply(made_x.to(dtype), made_weight.to(dtype), bias, x, weight, compute, casts, weight_in_dim, guards)


def _apply(*args: Any) -> Tensor:
    result: Tensor = _RemadeLinear.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _cast(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda original: change(original).to(dtype)


class _RemadeLinear(torch.autograd.Function):
    """Takes what is used as differentiable inputs, and keeps what it is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        made_x: Tensor,
        made_weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        weight: Tensor,
        compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        changes: Changes,
        weight_in_dim: int,
        guards: tuple[Tensor, ...],
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # As in F.linear: each gradient needs the other operand.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, *guards)
        ctx.changes, ctx.transposed = changes, weight_in_dim == 0
        # A view, which a product of batches is, could not be changed in place by what comes next; its data can.
        return compute(made_x, made_weight, bias).data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, *_ = ctx.saved_tensors
        change_x, change_weight = ctx.changes
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = gradient.reshape(-1, gradient.shape[-1])
        x_gradient = weight_gradient = bias_gradient = None
        with torch.autocast(gradient.device.type, enabled=False):
            if needs_weight:  # first: the input that it makes is gone when the input's gradient is made
                used = change_x(x)
                used = used.reshape(-1, used.shape[-1])
                weight_gradient = used.t().mm(rows) if ctx.transposed else rows.t().mm(used)
                del used
            if needs_x:
                used = change_weight(weight)
                used = used.t() if ctx.transposed else used
                x_gradient = rows.mm(used).view(*gradient.shape[:-1], used.shape[1])
            if needs_bias:
                bias_gradient = rows.sum(0)
        return x_gradient, weight_gradient, bias_gradient, *[None] * 6
