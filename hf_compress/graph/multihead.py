"""``nn.MultiheadAttention`` whose heads, head size and input size can differ from what it was built with.

PyTorch's own forward is one function that insists on ``embed_dim = num_heads * head_dim = input size`` and reads the
output projection's weight past its module. The class here computes the same from the shapes of the parameters; it is
put in place while a model is recorded, and stays where units were removed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class FlexibleMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention after Vaswani et al. 2017 with sizes taken from the parameters; made by ``loosen`` only."""

    scaling: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``; shapes [batch, length, size] with ``batch_first``, else [length, batch, size].

        ``is_causal`` is a hint for kernels, as there: the mask itself has to be given.
        """
        batched = query.dim() == 3
        inputs = [x if batched else x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value)]
        if not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        projected = [
            F.linear(x, weight, bias) for x, weight, bias in zip(inputs, self._weights(), self._biases(), strict=True)
        ]
        q, k, v = (x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in projected)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scaling
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scaling)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return output if batched else output.squeeze(0 if self.batch_first else 1), weights

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _biases(self) -> tuple[Tensor | None, ...]:
        return self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """Return one additive mask, broadcast against [batch, heads, queries, keys]."""
        parts = []
        if attention is not None:
            whole = attention.dim() == 3
            attention = _additive(attention, q)
            parts.append(attention.view(q.shape[0], -1, *attention.shape[1:]) if whole else attention)
        if padding is not None:
            parts.append(_additive(padding, q)[:, None, None, :])
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def can_loosen(module: nn.Module) -> bool:
    """Return whether the module is PyTorch's own attention in a form that is covered here."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


def loosen(module: nn.Module) -> None:
    """Give PyTorch's attention the forward that follows its parameters' sizes."""
    if can_loosen(module):
        module.scaling = module.head_dim**-0.5  # type: ignore[operator]
        module.__class__ = FlexibleMultiheadAttention


@contextmanager
def loosened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Loosen every module that can be, while the context is open."""
    changed = [(module, type(module)) for module in modules if can_loosen(module)]
    for module, _ in changed:
        loosen(module)
    try:
        yield
    finally:
        for module, own in changed:
            module.__class__ = own
            del module.scaling
