"""Losses between a student and its teacher: tensors in, one number per position out.

Masking and normalization belong to the caller, who knows what the task loss does.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.registry import distillation_losses


class DistillationLoss(Protocol):
    """Compares logits, [positions, classes] each, and returns [positions]; 0 where they agree."""

    def __call__(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor: ...  # noqa: D102


@distillation_losses.register("kl")
def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), in float32 or better.

    The factor T^2 keeps gradients of the same size whatever the temperature.

    Args:
        student: Logits, [positions, classes].
        teacher: Logits, [positions, classes]; a class that the teacher excludes with -inf counts as probability 0.
        temperature: T > 0; higher is softer.

    Returns:
        The divergence in nats, [positions].

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.1.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student = F.log_softmax(student.to(dtype) / temperature, dim=-1)
    target = F.softmax(teacher.to(dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, target, reduction="none").sum(-1)
