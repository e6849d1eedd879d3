"""Losses of logits against the formulas, position by position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_compress import ConfigError, DistillationConfig, TrainingError
from hf_compress.distillation.logits import kl, mse, soft_cross_entropy
from hf_compress.distillation.losses import FeatureLoss, logits_loss, loss_of_logits
from hf_compress.distillation.sparse import sparse_kl
from hf_compress.registry import distillation_losses

NAMES = [name for name in distillation_losses if distillation_losses.get(name).reads == "logits"]


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


def divergence(p: list[float], q: list[float]) -> float:
    """KL(p || q)"""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def entropy(p: list[float]) -> float:
    return -math.fsum(a * math.log(a) for a in p if a > 0)


def jensen_shannon(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return entropy(middle) - (entropy(p) + entropy(q)) / 2


def squared(student: list[float], teacher: list[float]) -> float:
    pairs = [(a, b) for a, b in zip(student, teacher, strict=True) if b > -math.inf]
    return math.fsum((a - b) ** 2 for a, b in pairs) / len(pairs)


def reference(name: str, student: list[float], teacher: list[float], temperature: float) -> float:
    if name == "mse":
        return squared(student, teacher)
    if name == "binary_kl":
        yes = [
            (softmax([b, 0.0], temperature), softmax([a, 0.0], temperature))
            for a, b in zip(student, teacher, strict=True)
        ]
        return temperature**2 * math.fsum(divergence(p, q) for p, q in yes) / len(yes)
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    of_distributions = {
        "kl": lambda: divergence(p, q),
        "soft_cross_entropy": lambda: divergence(p, q) + entropy(p),
        "jensen_shannon": lambda: jensen_shannon(p, q),
        "reverse_kl": lambda: divergence(q, p),
    }
    return temperature**2 * of_distributions[name]()


def by_position(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return torch.tensor([reference(name, own, theirs, temperature) for own, theirs in rows], dtype=torch.float64)


def random_logits(positions: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, positions, classes, generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_every_loss_is_its_formula_at_every_position(name: str, temperature: float) -> None:
    student, teacher = random_logits(5, 7)
    result = distillation_losses.get(name)(student, teacher, temperature)
    torch.testing.assert_close(result, by_position(name, student, teacher, temperature), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_least_where_student_and_teacher_agree(name: str) -> None:
    loss = distillation_losses.get(name)
    student, teacher = random_logits(6, 5)
    same = teacher.clone().requires_grad_()
    least = loss(same, teacher, 2.0)
    assert (loss(student, teacher, 2.0) > least + 1e-3).all()
    least.sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-12)
    if name != "soft_cross_entropy":
        torch.testing.assert_close(least.detach(), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, teacher = random_logits(3, 4)
    loss = distillation_losses.get(name)
    assert torch.autograd.gradcheck(lambda own: loss(own, teacher, 1.7), student.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_computes_in_float32_whatever_comes_in(name: str, dtype: torch.dtype) -> None:
    loss = distillation_losses.get(name)
    student, teacher = (logits.to(dtype) for logits in random_logits(3, 1000))
    result = loss(student, teacher, 2.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(student.float(), teacher.float(), 2.0), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("both", [False, True], ids=["teacher", "both"])
def test_classes_that_are_excluded_give_the_limit_of_small_logits(name: str, both: bool) -> None:
    student, teacher = random_logits(4, 6)
    teacher[:, 2] = -math.inf
    student[:, 2] = -math.inf if both else student[:, 2]
    student.requires_grad_()
    loss = distillation_losses.get(name)(student, teacher, 2.0)
    loss.sum().backward()
    own, theirs = student.detach(), teacher
    if name != "binary_kl" and (both or name in ("reverse_kl", "mse")):  # Left out altogether.
        rest = [0, 1, 3, 4, 5]
        own, theirs = own[:, rest], theirs[:, rest]
    torch.testing.assert_close(loss.detach(), by_position(name, own, theirs, 2.0), rtol=1e-10, atol=1e-12)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name: str) -> None:
    student = torch.tensor([[3e4, -3e4, 0.0], [0.0, 0.0, 0.0]]).half().requires_grad_()
    teacher = torch.tensor([[-3e4, 3e4, 0.0], [6e4, 0.0, -6e4]]).half()
    loss = distillation_losses.get(name)(student, teacher, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_kl_gradient_at_high_temperature_is_the_difference_of_centered_logits() -> None:
    """Hinton et al. 2015, eq. 4: T^2 * dL/dz -> (z - v) / N for zero-mean logits."""
    student, teacher = random_logits(4, 6)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    kl(student, teacher, 1e5).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 6, rtol=1e-4, atol=1e-5)


def test_soft_cross_entropy_of_sure_teachers_is_the_cross_entropy_of_their_labels() -> None:
    student, _ = random_logits(5, 4)
    labels = torch.tensor([0, 3, 1, 1, 2])
    sure = torch.full((5, 4), -math.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(
        soft_cross_entropy(student, sure, 1.0), torch.nn.functional.cross_entropy(student, labels, reduction="none")
    )


def test_mse_serves_regression_and_no_temperature() -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.5]])
    torch.testing.assert_close(mse(student, teacher, 1.0), torch.tensor([9.0, 0.25]))
    without = [name for name in NAMES if not distillation_losses.get(name).uses_temperature]
    assert without == ["mse"]
    student, teacher = random_logits(3, 4)
    for name in NAMES:
        loss = distillation_losses.get(name)
        changes = not torch.equal(loss(student, teacher, 1.0), loss(student, teacher, 2.0))
        assert changes == loss.uses_temperature


@pytest.mark.parametrize("name", NAMES)
def test_a_config_takes_losses_of_logits_only(name: str) -> None:
    assert DistillationConfig(loss=name).loss == name
    with pytest.raises(ConfigError, match="unknown value 'hidden_mse'"):
        DistillationConfig(loss="hidden_mse")


# Only the k most likely classes of the teacher.


def most_likely(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    top = teacher.topk(k, dim=-1)
    rest = (teacher / temperature).scatter(-1, top.indices, -math.inf)
    return top.indices, top.values, rest.logsumexp(-1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 8), data=st.data())
def test_sparse_kl_is_the_divergence_of_the_coarser_distributions(seed: int, classes: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, classes))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.5]))
    student, teacher = random_logits(4, classes, seed)
    indices, known, log_rest = most_likely(teacher, k, temperature)
    expected = []
    for own, theirs, chosen in zip(student.tolist(), teacher.tolist(), indices.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(own, temperature)
        others = [number for number in range(classes) if number not in chosen]
        coarse = [[x[i] for i in chosen] + [math.fsum(x[i] for i in others)] for x in (p, q)]
        expected.append(temperature**2 * divergence(*coarse))
    result = sparse_kl(student, indices, known, log_rest, temperature)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    assert (result <= kl(student, teacher, temperature) + 1e-12).all()


@pytest.mark.parametrize("rest", [True, False])
def test_sparse_kl_of_all_classes_is_kl(rest: bool) -> None:
    student, teacher = random_logits(5, 6)
    indices, known, log_rest = most_likely(teacher, 6, 2.0)
    assert (log_rest == -math.inf).all()
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    sparse, full = sparse_kl(first, indices, known, log_rest if rest else None, 2.0), kl(second, teacher, 2.0)
    torch.testing.assert_close(sparse, full, rtol=1e-12, atol=1e-12)
    sparse.sum().backward()
    full.sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-12)


def test_sparse_kl_without_the_rest_gives_the_teachers_probability_to_the_known_classes() -> None:
    student, teacher = random_logits(5, 6)
    indices, known, _ = most_likely(teacher, 2, 2.0)
    alone = torch.full_like(teacher, -math.inf).scatter(1, indices, known)
    torch.testing.assert_close(sparse_kl(student, indices, known, None, 2.0), kl(student, alone, 2.0))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_sparse_kl_has_the_gradients_of_finite_differences(k: int) -> None:
    student, teacher = random_logits(3, 6)
    indices, known, log_rest = most_likely(teacher, k, 2.0)
    known[0, 0] = -math.inf
    assert torch.autograd.gradcheck(lambda own: sparse_kl(own, indices, known, log_rest, 2.0), student.requires_grad_())


def test_sparse_kl_takes_stored_half_precision() -> None:
    student, teacher = random_logits(3, 50)
    indices, known, log_rest = most_likely(teacher, 4, 2.0)
    result = sparse_kl(student.bfloat16(), indices, known.half(), log_rest.half(), 2.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), sparse_kl(student.bfloat16().double(), indices, known, log_rest, 2.0), rtol=0.02, atol=0.01
    )


@pytest.mark.parametrize(
    ("indices", "known", "rest"),
    [
        ((3, 2), (3, 1), None),
        ((2, 2), (2, 2), None),
        ((3, 7), (3, 7), None),
        ((3, 2), (3, 2), (3, 1)),
        ((3,), (3,), None),
    ],
)
def test_sparse_kl_refuses_other_shapes(
    indices: tuple[int, ...], known: tuple[int, ...], rest: tuple[int, ...]
) -> None:
    log_rest = None if rest is None else torch.zeros(rest)
    with pytest.raises(TrainingError, match=r"needed: \[positions, classes\]"):
        sparse_kl(torch.zeros(3, 6), torch.zeros(indices, dtype=torch.long), torch.zeros(known), log_rest, 1.0)


def test_no_loss_waits_for_the_device() -> None:
    """A fake tensor has no values, so whatever reads one raises."""
    with FakeTensorMode():
        student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
        losses = [distillation_losses.get(name)(student, teacher, 2.0) for name in NAMES]
        losses.append(sparse_kl(student, torch.zeros(4, 2, dtype=torch.long), teacher[:, :2], teacher[:, 0], 2.0))
        torch.stack(losses).sum().backward()
        assert [tuple(loss.shape) for loss in losses] == [(4,)] * (len(NAMES) + 1)
        with pytest.raises(Exception, match="aten"):
            student[student > 0].sum()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda own, theirs: (own - theirs).square().mean(), r"shape \[\] for 4 positions"),
        (lambda own, theirs: (own - theirs).square(), r"shape \[4, 3\] for 4 positions"),
        (lambda own, theirs: 0.5, "a float for 4 positions"),
    ],
    ids=["a mean over positions", "no mean over classes", "a number"],
)
def test_a_loss_must_give_one_number_for_each_position(value, found, monkeypatch) -> None:
    """A mean would be summed and divided by the count: silently too small."""
    monkeypatch.setattr(distillation_losses, "_entries", dict(distillation_losses._entries))
    logits_loss("mine")(lambda student, teacher, temperature: value(student, teacher))
    student, teacher = torch.randn(2, 4, 3)
    with pytest.raises(TrainingError, match=f"the loss 'mine' returned {found}; needed: one number for each position"):
        loss_of_logits("mine", student, teacher, 1.0)


def test_a_loss_of_features_must_give_one_number_for_each_example() -> None:
    hidden, mask = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    loss = FeatureLoss(lambda own, theirs, mask: (own - theirs).square().mean(), "hidden_states")
    with pytest.raises(TrainingError, match=r"returned shape \[\] for 2 examples; needed: one number for each example"):
        loss(hidden, hidden, mask)
