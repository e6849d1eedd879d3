"""Losses of logits: how far the student's distribution over the classes is from the teacher's, at every position.

The factor T^2 keeps gradients of the same size whatever the temperature (Hinton et al. 2015, arXiv:1503.02531, section
2.1). A class that the teacher excludes with -inf has probability 0; the student may exclude it too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.losses import logits_loss


@logits_loss("kl")
def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), in float32 or better.

    Args:
        student: Logits, [positions, classes].
        teacher: Logits, [positions, classes].
        temperature: T > 0; higher is softer.

    Returns:
        The divergence in nats, [positions].

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.1.
    """
    log_student, target = log_softmax(student, temperature), _softmax(teacher, temperature)
    terms = F.kl_div(log_student, target, reduction="none")
    return temperature**2 * _without_impossible(terms, target).sum(-1)


@logits_loss("soft_cross_entropy")
def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return -T^2 * sum p_teacher log p_student at temperature T, [positions], in nats; arguments as for ``kl``.

    It is ``kl`` plus T^2 times the teacher's entropy: the same gradient, and not 0 where they agree.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    log_student, target = log_softmax(student, temperature), _softmax(teacher, temperature)
    return -(temperature**2) * _without_impossible(log_student * target, target).sum(-1)


@logits_loss("reverse_kl")
def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(softmax(student / T) || softmax(teacher / T)), [positions], in nats; arguments as for ``kl``.

    It makes the student give up what the teacher finds unlikely rather than cover all that it finds likely. Classes
    that the teacher excludes are left out of the student's distribution, which would be infinitely far otherwise.

    Source: Gu et al. 2023, MiniLLM, arXiv:2306.08543, eq. 1, here at every position of given texts; T as in ``kl``.
    """
    allowed = student.masked_fill(teacher == -math.inf, -math.inf)
    log_student, log_teacher = log_softmax(allowed, temperature), log_softmax(teacher, temperature)
    # Filled before the subtraction: -inf - -inf has no gradient.
    excluded = log_student == -math.inf
    difference = log_student.masked_fill(excluded, 0.0) - log_teacher.masked_fill(excluded, 0.0)
    return temperature**2 * (log_student.exp() * difference).sum(-1)


@logits_loss("jensen_shannon")
def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, [positions]; arguments as for ``kl``.

    p and q are the distributions of teacher and student at temperature T. Without T^2 it is at most log 2 nats.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", section IV.
    """
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
    return temperature**2 * (expectation(p, log_p - log_m) + expectation(q, log_q - log_m)) / 2


@logits_loss("mse", uses_temperature=False)
def mse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean squared difference of the logits, [positions], in float32 or better.

    It also serves regression, which is a single class. Classes that the teacher excludes are left out.

    Args:
        student: Logits, [positions, classes].
        teacher: Logits, [positions, classes].
        temperature: Has no effect: logits are compared as they are.

    Returns:
        The mean over the classes, [positions].

    Source: Ba and Caruana 2014, arXiv:1312.6184, eq. 1, divided by the number of classes.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    excluded = teacher == -math.inf
    squared = (student.to(dtype) - teacher.to(dtype)).masked_fill(excluded, 0.0).square()
    return squared.sum(-1) / (~excluded).sum(-1).clamp_min(1)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) over the last dimension, in float32 or better."""
    return F.log_softmax(_scaled(logits, temperature), dim=-1)


def expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Return the sum of probabilities * values over the last dimension; what has probability 0 adds 0, be it inf."""
    return _weighted(probabilities, values).sum(-1)


def _weighted(probabilities: Tensor, values: Tensor) -> Tensor:
    return probabilities * values.masked_fill(probabilities == 0, 0.0)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.softmax(_scaled(logits, temperature), dim=-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _without_impossible(terms: Tensor, target: Tensor) -> Tensor:
    """Zero the terms of classes with probability 0, which are 0 * inf where the student excludes the class too.

    Filling log probabilities beforehand would keep another tensor of the size of the logits for the backward pass; here
    their gradients are 0 anyhow, the probability itself.
    """
    return terms.masked_fill_(target == 0, 0.0)


@logits_loss("binary_kl")
def binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * the mean over classes of KL(sigmoid(teacher / T) || sigmoid(student / T)), for yes-or-no labels.

    Each class is a distribution over yes and no, as in multi-label classification with binary cross entropy, which
    Transformers averages over classes, too.

    Args:
        student: Logits, [positions, classes].
        teacher: Logits, [positions, classes].
        temperature: T > 0; higher is softer.

    Returns:
        The divergence in nats, [positions].

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.1, for Bernoulli distributions.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    own, theirs = student.to(dtype) / temperature, teacher.to(dtype) / temperature
    yes = torch.sigmoid(theirs)
    of_yes = _weighted(yes, F.logsigmoid(theirs) - F.logsigmoid(own))
    of_no = _weighted(1 - yes, F.logsigmoid(-theirs) - F.logsigmoid(-own))
    return temperature**2 * (of_yes + of_no).mean(-1)
