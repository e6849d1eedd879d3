"""Which positions teach: exactly those that the task loss counts."""

import torch
from torch import Tensor

from hf_compress.errors import TrainingError

IGNORED_LABEL = -100
"""The label that every task loss of Transformers leaves out."""


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Check that logits can be compared.

    Raises:
        TrainingError: If their shapes differ.
    """
    if student.shape != teacher.shape:
        raise TrainingError(
            f"distillation: the student's logits have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; they must be equal. Use a teacher with the same head and the same inputs."
        )


def counted_positions(
    logits: Tensor,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    shift: bool = False,
) -> Tensor:
    """Return which positions the task loss counts.

    Args:
        logits: [batch, classes] or [batch, length, classes].
        labels: [batch] or [batch, length]; positions labeled -100 are left out. None if there are none.
        attention_mask: [batch, length], 0 at padding; used for token logits without labels.
        shift: Whether position i predicts the label at i + 1, as in causal language models; the last then never counts.

    Returns:
        Bool, [batch] or [batch, length].

    Raises:
        TrainingError: If shapes do not fit each other.
    """
    shape = logits.shape[:-1]
    if labels is not None:
        counts = _fit("labels", labels, shape).to(logits.device) != IGNORED_LABEL
        return _before_next(counts) if shift else counts
    if attention_mask is not None and len(shape) > 1:
        mask = _fit("attention_mask", attention_mask, shape).to(logits.device).bool()
        return _before_next(mask) & mask if shift else mask
    everywhere = torch.ones(shape, dtype=torch.bool, device=logits.device)
    return _before_next(everywhere) if shift else everywhere


def _before_next(counts: Tensor) -> Tensor:
    """Return, for each position, whether the one after it counts."""
    return torch.cat([counts[..., 1:], torch.zeros_like(counts[..., :1])], dim=-1)


def _fit(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape and tensor.shape != (*shape, 1):
        raise TrainingError(
            f"distillation: {name} has shape {list(tensor.shape)}, but the logits have {list(shape)} positions; one "
            "value per position is needed. Logits cut by logits_to_keep, or with classes in another dimension than "
            "the last one, cannot be distilled."
        )
    return tensor.reshape(shape)
