"""Losses of attention maps.

Where the numbers of heads differ, the means over the heads are compared. Take maps without dropout: a probability that
dropout has set to 0 says nothing about the student.
"""

import torch
from torch import Tensor

from hf_compress.distillation.losses import feature_loss, mean_over_positions, num_positions
from hf_compress.errors import TrainingError


@feature_loss("attention_kl", "attentions")
def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Return KL(teacher || student) of each query's distribution over the keys, in nats.

    The mean over heads and over the queries that count, [batch]. A key to which the student gives exactly 0 counts as
    the smallest normal number, about e^-87.

    Args:
        student: Probabilities, [batch, heads, length, keys].
        teacher: Probabilities, [batch, heads, length, keys].
        mask: Queries that count, bool, [batch, length].
        key_mask: Keys that count, bool, [batch, keys]; None in self-attention, where they are the queries. What the
            others get is shared out among those that count.

    Returns:
        One value per example, [batch].

    Raises:
        TrainingError: If ``key_mask`` has another shape.

    Source: Sun et al. 2020, MobileBERT, arXiv:2004.02984, section 3.5, attention transfer.
    """
    own, theirs = (_shares(maps) for maps in _same_heads(student, teacher, _keys(student, mask, key_mask)))
    tiny = torch.finfo(own.dtype).tiny
    divergence = (theirs * (theirs.clamp_min(tiny).log() - own.clamp_min(tiny).log())).sum(-1)
    return mean_over_positions(divergence.mean(1), mask)


@feature_loss("attention_mse", "attentions")
def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of the probabilities; arguments as for ``attention_kl``.

    The mean over heads, and over the queries and keys that count, [batch].

    Raises:
        TrainingError: If ``key_mask`` has another shape.

    Source: Jiao et al. 2019, TinyBERT, arXiv:1909.10351, eq. 7, on probabilities, with padding left out.
    """
    keys = _keys(student, mask, key_mask)
    own, theirs = _same_heads(student, teacher, keys)
    squared = (own - theirs).square().sum(-1) / num_positions(keys)[:, None, None]
    return mean_over_positions(squared.mean(1), mask)


def _keys(maps: Tensor, mask: Tensor, key_mask: Tensor | None) -> Tensor:
    keys = mask if key_mask is None else key_mask
    if keys.shape != (len(maps), maps.shape[-1]) or keys.dtype != torch.bool:
        raise TrainingError(
            f"distillation: attention maps of shape {list(maps.shape)} with keys that count by a {keys.dtype} of shape "
            f"{list(keys.shape)}; needed: torch.bool, [batch, keys]. Pass key_mask where queries and keys are not the "
            "same positions, as in cross-attention or with a cache."
        )
    return keys


def _same_heads(student: Tensor, teacher: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps that can be compared head by head, with zeros at the keys that do not count."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    without = ~keys[:, None, None, :]
    return student.masked_fill(without, 0.0), teacher.masked_fill(without, 0.0)


def _shares(maps: Tensor) -> Tensor:
    """Make rows sum to 1, which they do only roughly in half precision."""
    return maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
