"""What holds for every loss of features, found by its name in the registry."""

import math
from typing import Any

import pytest
import torch
from feature_examples import (
    MASK,
    NAMES,
    REFERENCES,
    each,
    features,
    get,
    options,
    reference,
    tensors,
    where_counted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_compress import ConfigError, TrainingError
from hf_compress.distillation.attention import attention_kl, attention_mse
from hf_compress.distillation.hidden import hidden_cosine, hidden_mse
from hf_compress.distillation.losses import FeatureLoss, Features, unit
from hf_compress.distillation.relations import relations

every_loss = pytest.mark.parametrize("name", NAMES)


def run(loss: FeatureLoss, student: Features, teacher: Features, mask: Tensor) -> Tensor:
    return loss(student, teacher, mask, **options(loss))


def gradients(loss: FeatureLoss, student: Features, teacher: Features, mask: Tensor) -> tuple[Tensor, ...]:
    """The loss of each example, then the gradient of its sum with regard to the student's tensors."""
    own = each(lambda tensor: tensor.detach().clone().requires_grad_(), student)
    values = run(loss, own, teacher, mask)
    return values.detach(), *torch.autograd.grad(values.sum(), tensors(own))


def test_every_loss_has_a_reference() -> None:
    assert sorted(REFERENCES) == sorted(NAMES)


@every_loss
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_every_example_is_what_loops_over_its_counted_positions_give(name: str, seed: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 5))
    rows = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=3)))
    loss = get(name)
    student, teacher = features(loss, seed=seed, batch=len(mask), length=length)
    expected = reference(name, student, teacher, mask)
    torch.testing.assert_close(run(loss, student, teacher, mask), expected, rtol=1e-9, atol=1e-9)


@every_loss
def test_it_is_zero_where_both_agree_and_positive_elsewhere(name: str) -> None:
    loss = get(name)
    student, teacher = features(loss)
    zeros = torch.zeros(len(MASK), dtype=torch.float64)
    values, *slopes = gradients(loss, student, student, MASK)
    torch.testing.assert_close(values, zeros, rtol=0, atol=1e-12)
    assert all(slope.abs().max() < 1e-12 for slope in slopes)
    # A single token, the last example, has a relation to itself only, which is the same in all models.
    assert (run(loss, student, teacher, MASK)[:3] > 1e-4).all()


@every_loss
@pytest.mark.parametrize("filling", [7.0, math.nan, math.inf])
def test_padding_has_no_influence(name: str, filling: float) -> None:
    loss = get(name)
    student, teacher = features(loss)

    def zero(tensor: Tensor) -> Tensor:
        return tensor.where(where_counted(tensor, MASK), 0.0)

    def fill(tensor: Tensor) -> Tensor:
        return tensor.where(where_counted(tensor, MASK), filling)

    clean = gradients(loss, each(zero, student), each(zero, teacher), MASK)
    dirty = gradients(loss, each(fill, student), each(fill, teacher), MASK)
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert all((slope[~where_counted(slope, MASK)] == 0).all() for slope in dirty[1:])
    assert all((slope != 0).any() for slope in dirty[1:])


@every_loss
def test_longer_padding_changes_nothing(name: str) -> None:
    loss = get(name)
    student, teacher = features(loss)

    def longer(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 3, 0, 3) if tensor.dim() == 4 else (0, 0, 0, 3), value=5.0)

    mask = torch.nn.functional.pad(MASK, (0, 3))
    values = run(loss, each(longer, student), each(longer, teacher), mask)
    torch.testing.assert_close(values, run(loss, student, teacher, MASK), rtol=1e-12, atol=1e-12)


@every_loss
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    loss = get(name)
    student, teacher = features(loss)
    values = run(loss, student, teacher, MASK)
    for chosen in ([2, 0, 3, 1], [1], [3, 3]):
        alone = run(loss, each(lambda x: x[chosen], student), each(lambda x: x[chosen], teacher), MASK[chosen])  # noqa: B023
        torch.testing.assert_close(alone, values[chosen], rtol=1e-12, atol=1e-14)


@every_loss
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss = get(name)
    mask = MASK.clone()
    mask[3] = False
    student, teacher = features(loss)
    own = tensors(each(lambda tensor: tensor.requires_grad_(), student))

    def of_student(*layers: Tensor) -> Tensor:
        return run(loss, layers if loss.successive else layers[0], teacher, mask)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(of_student, own)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(name: str, dtype: torch.dtype) -> None:
    loss = get(name)
    student, teacher = (each(lambda tensor: tensor.to(dtype), side) for side in features(loss))
    exact = run(loss, *(each(lambda tensor: tensor.float(), side) for side in (student, teacher)), MASK)
    values, *slopes = gradients(loss, student, teacher, MASK)
    assert values.dtype == torch.float32
    assert torch.equal(values, exact)
    assert all(slope.dtype == dtype for slope in slopes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(loss, student, teacher, MASK), exact)
    close = run(loss, *features(loss), MASK).float()
    torch.testing.assert_close(exact, close, rtol=0.1, atol=0.02)


@every_loss
def test_models_of_different_precision_are_compared_in_the_better_one(name: str) -> None:
    loss = get(name)
    student, teacher = features(loss)
    half = each(lambda tensor: tensor.bfloat16(), student)
    expected = run(loss, each(lambda tensor: tensor.double(), half), teacher, MASK)
    assert torch.equal(run(loss, half, teacher, MASK), expected)


@every_loss
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 6e4])
def test_values_of_extreme_size_have_finite_losses_and_gradients(name: str, magnitude: float) -> None:
    loss = get(name)
    student, teacher = (each(lambda tensor: tensor.float(), side) for side in features(loss))
    extreme = each(lambda tensor: tensor * magnitude, student)
    for own, theirs in ((extreme, teacher), (extreme, extreme)):
        values, *slopes = gradients(loss, own, theirs, MASK)
        assert values.isfinite().all()
        assert all(slope.isfinite().all() for slope in slopes)
    if not loss.needs_equal_width:
        theirs = each(lambda tensor: tensor * magnitude, teacher)
        assert all(tensor.isfinite().all() for tensor in gradients(loss, student, theirs, MASK))


@every_loss
def test_examples_without_counted_positions_are_zero(name: str) -> None:
    loss = get(name)
    student, teacher = features(loss)
    mask = MASK.clone()
    mask[1] = False
    values, *slopes = gradients(loss, student, teacher, mask)
    assert values[1] == 0
    assert all((slope[1] == 0).all() for slope in slopes)
    torch.testing.assert_close(values[[0, 2, 3]], run(loss, student, teacher, MASK)[[0, 2, 3]], rtol=0, atol=0)


@every_loss
def test_no_loss_waits_for_the_device(name: str) -> None:
    """A fake tensor has no values, so whatever reads one raises."""
    loss = get(name)
    with FakeTensorMode() as mode:
        student, teacher = (each(mode.from_tensor, side) for side in features(loss))
        own = each(lambda tensor: tensor.requires_grad_(), student)
        values = run(loss, own, teacher, mode.from_tensor(MASK))
        values.sum().backward()
        assert values.shape == (len(MASK),)


@every_loss
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    loss = get(name)
    student, teacher = features(loss)
    cases: list[tuple[Any, Any, Any, str]] = [
        (student, teacher, MASK[:, :-1], "different texts"),
        (each(lambda x: x[:2], student), teacher, MASK, "different texts"),
        (student, each(lambda x: x[..., :-1, :], teacher), MASK, "different texts"),
        (student, teacher, MASK.long(), r"the mask is torch.int64"),
        (student, teacher, MASK[0], "have shapes"),
        (each(lambda x: x[0], student), teacher, MASK, "have shapes"),
        ((*tensors(student), tensors(student)[0]), teacher, MASK, f"the student gave {2 + loss.successive} tensors"),
    ]
    if loss.needs_equal_width:
        cases.append((each(lambda x: x[..., :-1], student), teacher, MASK, "unequal widths"))
    for own, theirs, mask, message in cases:
        with pytest.raises(TrainingError, match=message):
            run(loss, own, theirs, mask)


def test_what_a_caller_must_know() -> None:
    assert [name for name in NAMES if get(name).successive] == ["fsp"]
    assert [name for name in NAMES if get(name).needs_equal_width] == ["fsp", "hidden_cosine", "hidden_mse", "pkd"]
    assert {name: get(name).options for name in NAMES if get(name).options} == {
        "attention_kl": ("key_mask",),
        "attention_mse": ("key_mask",),
        "relations": ("relation_heads",),
    }
    readings = {name: get(name).reads for name in NAMES if get(name).reads != "hidden_states"}
    assert readings == {"attention_kl": "attentions", "attention_mse": "attentions", "relations": "relations"}


# Single losses.


def test_hidden_mse_by_hand() -> None:
    student = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(hidden_mse(student, torch.zeros_like(student), mask), torch.tensor([39 / 4]))


def test_hidden_cosine_is_two_for_opposites_and_one_for_zero_vectors() -> None:
    student = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]).requires_grad_()
    loss = hidden_cosine(student, torch.tensor([[[-3.0, -6.0]], [[1.0, 1.0]]]), torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(loss.detach(), torch.tensor([2.0, 1.0]))
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad[1].tolist() == [[0.0, 0.0]]


def test_unit_vectors_have_length_one_down_to_tiny_ones() -> None:
    vectors = torch.tensor([[3.0, 4.0], [3e-12, 4e-12], [0.0, 0.0], [1e-14, 0.0]])
    torch.testing.assert_close(unit(vectors), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("loss", [attention_kl, attention_mse], ids=["kl", "mse"])
def test_heads_are_compared_one_by_one_where_their_numbers_agree(loss: FeatureLoss) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 5, 5, dtype=torch.float64).softmax(-1)
    mask = torch.ones(1, 5, dtype=torch.bool)
    name = "attention_kl" if loss is attention_kl else "attention_mse"
    torch.testing.assert_close(loss(student, teacher, mask), reference(name, student, teacher, mask))
    assert not torch.allclose(loss(student, teacher, mask), loss(student, teacher.flip(1), mask))


@pytest.mark.parametrize("loss", [attention_kl, attention_mse], ids=["kl", "mse"])
def test_cross_attention_has_its_own_keys(loss: FeatureLoss) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64).softmax(-1)
    mask, key_mask = (
        torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(),
        torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool(),
    )
    whole = loss(student[:1], teacher[:1], mask[:1], key_mask=key_mask[:1])
    cut = loss(student[1:, :, :2, :4], teacher[1:, :, :2, :4], mask[1:, :2], key_mask=key_mask[1:, :4])
    torch.testing.assert_close(loss(student, teacher, mask, key_mask=key_mask), torch.cat([whole, cut]))
    with pytest.raises(TrainingError, match="Pass key_mask"):
        loss(student, teacher, mask)


def test_attention_kl_counts_only_masked_keys_as_they_are_in_causal_models() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    student, teacher = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf).softmax(-1)
    mask = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(
        attention_kl(student, teacher, mask), reference("attention_kl", student, teacher, mask), rtol=1e-9, atol=1e-12
    )


def test_relations_of_attention_heads_are_their_attention() -> None:
    """With keys equal to queries, the teacher's relation is scaled dot-product attention with identity values."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 4, 12, dtype=torch.float64)
    mask, eye = torch.ones(1, 4, dtype=torch.bool), torch.eye(4, dtype=torch.float64).expand(1, 3, 4, 4)

    def attention(vectors: Tensor) -> Tensor:
        heads = vectors.view(1, 4, 3, -1).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, eye)

    expected = attention_kl(attention(student), attention(teacher), mask)
    torch.testing.assert_close(relations(student, teacher, mask, relation_heads=3), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("heads", [0, -1, 4, 5, 2.0, True])
def test_relation_heads_must_divide_both_widths(heads: Any) -> None:
    student, teacher, mask = torch.zeros(1, 2, 6), torch.zeros(1, 2, 12), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"relation_heads is .*(allowed: an int >= 1|largest that does is 6)"):
        relations(student, teacher, mask, relation_heads=heads)
