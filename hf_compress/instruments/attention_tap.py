"""Watch self-attention from inside ordinary forward passes: query, key and value of every layer, as they are used.

Every attention module of Transformers asks ``AttentionInterface.get_interface`` for the function that attends, and
calls it with itself, query, key, value and mask, whichever implementation is in use. That is the one place to look:
it says which layer calls, comes after rotary embeddings and before key and value heads are repeated, and the
kernels run as always. Modes that intercept PyTorch's functions see neither the layer nor eager attention, and slow
down every operation; implementations of one's own change the masks that models prepare.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from hf_compress.errors import TrainingError
from hf_compress.instruments.attach import attachment_of, own_class
from hf_compress.instruments.leaf_forward import quantized
from hf_compress.instruments.targets import ATTENDED, PROBABILITIES
from hf_compress.quantization.quantizers import Quantizer

WATCHED = ("eager", "sdpa")
"""The implementations whose masks say what attends to what."""


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """What one self-attention computes with.

    Tensors that nobody wanted are None. Keys and values of grouped-query attention are not repeated. Heads that
    pruning has masked are there, since their gates come after attention: ``LeftUnits`` knows which they are.
    """

    query: Tensor | None
    """[batch, heads, length, head_dim], after rotary embedding."""

    key: Tensor | None
    """[batch, key heads, length, head_dim], after rotary embedding."""

    value: Tensor | None
    """[batch, key heads, length, head_dim]"""

    scale: float
    """What query times key is multiplied by."""

    mask: Tensor | None
    """True where a query may attend, or what is added to its scores; broadcasts to [batch, heads, length, length]."""

    bias: Tensor | None
    """Added to the scores, as T5 does with positions; broadcasts to [batch, heads, length, length]."""

    is_causal: bool
    """Whether a query attends to no later position, beside what ``mask`` says."""

    softcap: float | None
    """Scores are squashed into [-softcap, softcap] before the mask, as Gemma does."""

    has_gradient: bool
    """Whether autograd was recording."""

    module: nn.Module
    """What attended."""

    num_heads: int
    """Of queries."""

    value_dim: int
    """Width of the values of a head."""

    def probabilities(self) -> Tensor:
        """Return attention maps without dropout, float, [batch, heads, query length, key length].

        A query that may attend to nothing attends to everything equally.

        Raises:
            ValueError: If the tap did not want attention maps.
        """
        if self.query is None or self.key is None:
            raise ValueError("attention maps need query and key; create the tap with 'attentions' among its wants")
        batch, _, length, head_dim = self.query.shape
        grouped = self.query.view(batch, self.key.shape[1], -1, length, head_dim)
        scores = (grouped @ self.key.to(grouped.dtype).unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.float()
        if self.bias is not None:
            scores = scores + self.bias[..., : scores.shape[-1]].float()
        lowest = torch.finfo(scores.dtype).min
        if self.is_causal:
            later = torch.ones(length, scores.shape[-1], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, lowest)
        if self.mask is not None:
            mask = self.mask[..., : scores.shape[-1]]
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.float()
        result: Tensor = scores.clamp(min=lowest).softmax(dim=-1)
        return result


Accept = Callable[[nn.Module, str, tuple[Any, ...], dict[str, Any]], None]
"""Told of each call: the module, the implementation, (query, key, value, mask, ...), and the other arguments."""


class AttentionWatch:
    """Has ``accept`` called whenever one of ``modules`` attends, between ``open`` and ``close``."""

    def __init__(self, modules: set[int], accept: Accept) -> None:
        self.modules = modules
        """Identities of the modules; others may run meanwhile, such as those of a teacher."""
        self.accept = accept

    def open(self) -> None:
        """Begin to watch."""
        if not _told:
            # Compilers cannot trace what is kept for later: it is taken between their graphs.
            _told.append(torch.compiler.disable(_tell))  # type: ignore[no-untyped-call]
        if self not in _open:
            _open.append(self)
        _intercept()

    def close(self) -> None:
        """Stop, and leave Transformers as it was if nobody else watches."""
        if self in _open:
            _open.remove(self)
        # If somebody replaced it since, theirs may call ours, which then does nothing.
        if not _open and not _changing and AttentionInterface.get_interface is _get_interface:
            AttentionInterface.get_interface = _originals[0]  # type: ignore[method-assign]


def let_attention_change() -> None:
    """Have attention modules attend with what their quantizers make of queries, keys and values, from now on.

    That stays for good: modules with such quantizers may be copied, and those without are not affected.
    """
    _changing.append(True)
    _intercept()


_open: list[AttentionWatch] = []
_changing: list[bool] = []
_originals: list[Callable[..., Any]] = []
_told: list[Callable[..., None]] = []


def _intercept() -> None:
    if AttentionInterface.get_interface is not _get_interface:
        _originals[:] = [AttentionInterface.get_interface]
        AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]


def _get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
    attend = _originals[0](self, attn_implementation, default)
    if not _open and not _changing:
        return attend

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _open:
            _told[0](module, attn_implementation, args, kwargs)
        attachment = attachment_of(module)
        if attachment is None or not attachment.attention_quantizers:
            return attend(module, *args, **kwargs)
        quantizers = attachment.attention_quantizers
        args = _on_grids(module, quantizers, args)
        if PROBABILITIES in quantizers:
            return _by_maps(module, quantizers[PROBABILITIES], attn_implementation, args, kwargs)
        return attend(module, *args, **kwargs)

    return watched


def _on_grids(module: nn.Module, quantizers: Mapping[str, Quantizer], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of attention with query, key and value on their grids."""
    made = [
        x if (each := quantizers.get(part)) is None else quantized(module, each, x, None, {}, part)
        for part, x in zip(ATTENDED, args[:3], strict=True)
    ]
    return (*made, *args[3:])


def _by_maps(
    module: nn.Module, quantizer: Quantizer, implementation: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend with attention maps on their grid, which no fused kernel has; return [batch, length, heads, dim] and them.

    Dropout comes after rounding, so that the grid is the one that is deployed.
    """
    name = own_class(module).__name__
    seen = self_attention(module, name, implementation, args, kwargs, ("attentions",), purpose="quantization")
    value = args[2]
    maps = quantized(module, quantizer, seen.probabilities().to(value.dtype), None, {}, PROBABILITIES)
    dropped = nn.functional.dropout(maps, p=float(kwargs.get("dropout") or 0.0), training=module.training)
    grouped = dropped.view(dropped.shape[0], value.shape[1], -1, *dropped.shape[2:])  # several queries to a value
    attended = (grouped @ value.unsqueeze(2)).flatten(1, 2)
    return attended.transpose(1, 2).contiguous(), maps


def _tell(module: nn.Module, implementation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watch in tuple(_open):
        if id(module) in watch.modules:
            watch.accept(module, implementation, args, kwargs)


def self_attention(
    module: nn.Module,
    name: str,
    implementation: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep: Collection[str],
    purpose: str = "distillation",
) -> SelfAttention:
    """Return what a call computes with.

    Args:
        module: The module that attends.
        name: Its name, for messages.
        implementation: Name of the attention implementation.
        args: Query, key, value and perhaps the mask.
        kwargs: The other arguments.
        keep: Any of "attentions" (whatever maps need), "queries", "keys" and "values".
        purpose: Who asks, for messages.

    Raises:
        TrainingError: If the implementation does not show what attends to what.
    """
    if implementation not in WATCHED:
        raise TrainingError(
            f"{purpose}: {name!r} computes attention by {implementation!r}, which does not show what attends to what. "
            "Load student and teacher with attn_implementation='sdpa' or 'eager'."
        )
    query, key, value = args[:3]
    mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
    if "attentions" in keep and kwargs.get("s_aux") is not None:
        raise TrainingError(
            f"{purpose}: the attention of {name!r} has sinks, so its maps do not sum to 1 and cannot be read. "
            "Leave attention maps alone."
        )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = kwargs.get("scaling")
    maps = "attentions" in keep
    return SelfAttention(
        query=query if maps or "queries" in keep else None,
        key=key if maps or "keys" in keep else None,
        value=value if "values" in keep else None,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask if maps else None,
        bias=kwargs.get("position_bias") if maps else None,
        # Eager attention has it in its mask, and fused attention only where there is none.
        is_causal=implementation == "sdpa" and mask is None and query.shape[2] > 1 and bool(causal),
        softcap=kwargs.get("softcap"),
        has_gradient=torch.is_grad_enabled(),
        module=module,
        num_heads=query.shape[1],
        value_dim=value.shape[-1],
    )
