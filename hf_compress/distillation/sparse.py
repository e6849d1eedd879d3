"""Distillation from the few most likely classes of a teacher, which can be stored when all of them cannot."""

import torch
from torch import Tensor

from hf_compress.distillation.logits import expectation, log_softmax
from hf_compress.errors import TrainingError


def sparse_kl(
    student: Tensor, indices: Tensor, teacher_logits: Tensor, log_rest: Tensor | None, temperature: float
) -> Tensor:
    """Return T^2 * KL(teacher || student) where all classes but k are taken together as one.

    By the data processing inequality it is at most ``kl`` of all classes; it equals ``kl`` if k is their number, or if
    both models spread what is left in the same proportions.

    Args:
        student: Logits, [positions, classes].
        indices: The classes that are known of the teacher, long, [positions, k], none of them twice in a position.
        teacher_logits: Its logits of these classes, [positions, k]; -inf is probability 0.
        log_rest: Log of the sum of exp(logit / T) of its other classes, [positions], at this very temperature; -inf
            where there are none. None if it is not known: the teacher then gives all its probability to the k classes.
        temperature: T > 0.

    Returns:
        The divergence in nats, [positions], in float32 or better.

    Raises:
        TrainingError: If shapes do not fit each other.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.1, on the coarser set of k + 1 events.
    """
    _check(student, indices, teacher_logits, log_rest)
    log_student = log_softmax(student, temperature)
    own_rest = log_student.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    own = torch.cat([log_student.gather(-1, indices), own_rest], dim=-1)
    known = teacher_logits.to(own.dtype) / temperature
    rest = torch.full_like(known[..., :1], -torch.inf) if log_rest is None else log_rest.to(own.dtype).unsqueeze(-1)
    theirs = log_softmax(torch.cat([known, rest], dim=-1), 1.0)
    return temperature**2 * expectation(theirs.exp(), theirs - own)


def _check(student: Tensor, indices: Tensor, teacher_logits: Tensor, log_rest: Tensor | None) -> None:
    fits = student.dim() == 2 and indices.dim() == 2 and len(indices) == len(student)
    fits = fits and indices.shape == teacher_logits.shape and 1 <= indices.shape[1] <= student.shape[1]
    if not fits or (log_rest is not None and log_rest.shape != student.shape[:1]):
        rest = None if log_rest is None else list(log_rest.shape)
        raise TrainingError(
            f"distillation: student {list(student.shape)}, indices {list(indices.shape)}, teacher_logits "
            f"{list(teacher_logits.shape)}, log_rest {rest}; needed: [positions, classes], [positions, k] twice with "
            "1 <= k <= classes, and [positions] or None. Store the teacher's outputs for these very inputs."
        )
