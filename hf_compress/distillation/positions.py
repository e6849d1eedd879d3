"""Which positions teach: exactly those that the task loss counts."""

import torch
from torch import Tensor

from hf_compress.errors import TrainingError

IGNORED_LABEL = -100
"""The label that every task loss of Transformers leaves out."""


def select_positions(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    shift: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the logits at the positions that count.

    Args:
        student: Logits, [batch, classes] or [batch, length, classes].
        teacher: Logits of the same shape.
        labels: [batch] or [batch, length]; positions labeled -100 are left out. None if there are none.
        attention_mask: [batch, length], 0 at padding; used for token logits without labels.
        shift: Whether position i predicts the label at i + 1, as in causal language models.

    Returns:
        Two tensors [positions, classes].

    Raises:
        TrainingError: If shapes do not fit each other.
    """
    if student.shape != teacher.shape:
        raise TrainingError(
            f"distillation: the student's logits have shape {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; they must be equal. Use a teacher with the same head and the same inputs."
        )
    valid = _valid(student, labels, attention_mask, shift)
    if shift:
        student, teacher = student[..., :-1, :], teacher[..., :-1, :]
    # Indexing with bool tensors would wait for the device twice to learn how many there are.
    chosen = valid.flatten().nonzero().squeeze(1)
    return student.flatten(0, -2)[chosen], teacher.flatten(0, -2)[chosen]


def _valid(logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, shift: bool) -> Tensor:
    """Return the positions that count, bool, [batch] or [batch, length], one shorter if shifted."""
    shape = logits.shape[:-1]
    if labels is not None:
        counts = _fit("labels", labels, shape).to(logits.device) != IGNORED_LABEL
        return counts[..., 1:] if shift else counts
    if attention_mask is not None and len(shape) > 1:
        mask = _fit("attention_mask", attention_mask, shape).to(logits.device).bool()
        return mask[..., 1:] & mask[..., :-1] if shift else mask
    everywhere = torch.ones(shape, dtype=torch.bool, device=logits.device)
    return everywhere[..., 1:] if shift else everywhere


def _fit(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape and tensor.shape != (*shape, 1):
        raise TrainingError(
            f"distillation: {name} has shape {list(tensor.shape)}, but the logits have {list(shape)} positions; one "
            "value per position is needed. Logits cut by logits_to_keep, or with classes in another dimension than "
            "the last one, cannot be distilled."
        )
    return tensor.reshape(shape)
