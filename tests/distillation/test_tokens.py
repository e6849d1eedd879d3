"""Logits of the tokens that two models have."""

import pytest
import torch
from torch import Tensor

from hf_compress.distillation.logits import kl
from hf_compress.distillation.sparse import sparse_kl
from hf_compress.distillation.tokens import common_tokens, over_tokens_of


def logits(tokens: int, seed: int) -> Tensor:
    return torch.randn(6, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits, their tokens, and what the others add up to."""
    values, indices = teacher.topk(k)
    rest = (teacher / temperature).scatter(-1, indices, -torch.inf).logsumexp(-1)
    return values, indices, rest


@pytest.mark.parametrize(("own", "theirs"), [(5, 8), (8, 5), (5, 5)])
def test_the_first_tokens_are_common(own: int, theirs: int) -> None:
    student, teacher = logits(own, 0), logits(theirs, 1)
    first, second = common_tokens(student, teacher)
    assert torch.equal(first, student[:, :5])
    assert torch.equal(second, teacher[:, :5])
    assert (first is student) == (own == 5)


@pytest.mark.parametrize(("own", "theirs", "k"), [(5, 8, 8), (5, 8, 7), (8, 5, 5), (8, 5, 4), (5, 5, 5)])
def test_all_logits_of_a_teacher_say_what_those_of_common_tokens_say(own: int, theirs: int, k: int) -> None:
    """Value and gradient. If there is one more token, it is known too, or padding."""
    student, teacher = logits(own, 0).requires_grad_(), logits(theirs, 1)
    if k < theirs:
        teacher[:, min(own, theirs - 1)] = -9.0
    values, indices, rest = largest(teacher, k, 2.0)
    wide, known, others = over_tokens_of(student, indices, values, rest, theirs)
    found = sparse_kl(wide, indices, known, others, 2.0)
    wanted = kl(*common_tokens(student, teacher), 2.0)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][:, 5:].any()


@pytest.mark.parametrize("k", [1, 3])
def test_tokens_that_the_student_lacks_are_left_out_of_the_largest(k: int) -> None:
    """What is left is a distribution over the tokens that are known, and any other."""
    student, teacher = logits(5, 0), logits(8, 1)
    teacher[0, 6] = 9.0  # the most likely one is padding; with k=1 nothing is known
    values, indices, rest = largest(teacher, k, 2.0)
    wide, known, left = over_tokens_of(student, indices, values, rest, 8)
    found = sparse_kl(wide, indices, known, left, 2.0)
    for row in range(len(student)):
        kept = indices[row] < 5
        tokens = indices[row][kept]
        p = torch.cat([values[row][kept] / 2, rest[row, None]]).softmax(0)
        q = (student[row] / 2).softmax(0)
        others = 1 - q[tokens].sum()
        wanted = 4 * (p * (p.log() - torch.cat([q[tokens], others[None]]).log())).sum()
        torch.testing.assert_close(found[row], wanted)
    assert (indices[0] >= 5).any()
    assert torch.isfinite(found).all()
