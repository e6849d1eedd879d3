"""Losses of the relations between the tokens' queries, keys or values."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.losses import feature_loss, mean_over_positions
from hf_compress.errors import ConfigError


@feature_loss("relations", "relations")
def relations(student: Tensor, teacher: Tensor, mask: Tensor, *, relation_heads: int) -> Tensor:
    """Compare how the tokens' queries (or keys, or values) attend to each other.

    Vectors of all attention heads are regrouped into ``relation_heads`` parts. In each, every position that counts has
    a distribution softmax(A A^T / sqrt(d)) over the others; d is the width of a part. The result is KL(teacher ||
    student) in nats, the mean over the relation heads and the positions that count.

    Args:
        student: Queries, keys or values of one layer, heads side by side, [batch, length, width].
        teacher: The same of the teacher, [batch, length, width of the teacher].
        mask: Positions that count, bool, [batch, length].
        relation_heads: Number of parts; it divides both widths.

    Returns:
        One value per example, [batch].

    Raises:
        ConfigError: If ``relation_heads`` does not divide a width.

    Source: Wang et al. 2020, MiniLMv2, arXiv:2012.15828, eq. 2-4.
    """
    _check_heads(relation_heads, student.shape[-1], teacher.shape[-1])
    own, theirs = (_log_relations(vectors, mask, relation_heads) for vectors in (student, teacher))
    divergence = F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)
    return mean_over_positions(divergence.mean(1), mask)


def _log_relations(vectors: Tensor, mask: Tensor, relation_heads: int) -> Tensor:
    """Return log probabilities, [batch, relation_heads, length, length]."""
    parts = vectors.reshape(*vectors.shape[:2], relation_heads, -1).transpose(1, 2)
    scores = parts @ parts.mT / math.sqrt(parts.shape[-1])
    # Not -inf: without any position that counts, the softmax would be NaN.
    return F.log_softmax(scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min), dim=-1)


def _check_heads(relation_heads: int, width: int, teacher_width: int) -> None:
    if isinstance(relation_heads, bool) or not isinstance(relation_heads, int) or relation_heads < 1:
        raise ConfigError(f"relations: relation_heads is {relation_heads!r}; allowed: an int >= 1.")
    if width % relation_heads or teacher_width % relation_heads:
        raise ConfigError(
            f"relations: relation_heads is {relation_heads}, but the student is {width} and the teacher "
            f"{teacher_width} wide; it must divide both. The largest that does is {math.gcd(width, teacher_width)}."
        )
