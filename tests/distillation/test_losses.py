import math

import pytest
import torch

from hf_compress.distillation.losses import kl
from hf_compress.registry import distillation_losses


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_is_the_formula_at_every_position(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = []
    for own, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(own, temperature), softmax(theirs, temperature)
        expected.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    torch.testing.assert_close(
        kl(student, teacher, temperature), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_kl_gradient_at_high_temperature_is_the_difference_of_centered_logits() -> None:
    """Hinton et al. 2015, eq. 4: T^2 * dL/dz -> (z - v) / N for zero-mean logits."""
    torch.manual_seed(0)
    student = torch.randn(4, 6, dtype=torch.float64)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    kl(student, teacher, 1e5).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 6, rtol=1e-4, atol=1e-5)


def test_kl_computes_in_float32_whatever_comes_in() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 1000).bfloat16(), torch.randn(3, 1000).bfloat16()
    result = kl(student, teacher, 2.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, kl(student.float(), teacher.float(), 2.0), rtol=0, atol=0)


def test_kl_accepts_classes_that_the_teacher_excludes() -> None:
    student = torch.randn(2, 4).requires_grad_()
    teacher = torch.randn(2, 4)
    teacher[:, 1] = -math.inf
    loss = kl(student, teacher, 2.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", list(distillation_losses))
def test_every_loss_is_zero_where_student_and_teacher_agree_and_positive_elsewhere(name: str) -> None:
    loss = distillation_losses.get(name)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(logits, logits, 2.0), torch.zeros(6), rtol=0, atol=1e-6)
    assert (loss(logits.roll(1, dims=1), logits, 2.0) > 1e-3).all()
