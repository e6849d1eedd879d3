import pytest
import torch
from torch import Tensor

from hf_compress.distillation.positions import select_positions
from hf_compress.errors import TrainingError


def numbered(*shape: int) -> Tensor:
    """Logits [..., 2] whose first class is the flat index of the position."""
    index = torch.arange(float(torch.Size(shape).numel())).view(shape)
    return torch.stack([index, torch.zeros(shape)], dim=-1)


def chosen(logits: Tensor, **options: object) -> list[int]:
    student, teacher = select_positions(logits, logits + 100, **options)
    assert torch.equal(teacher, student + 100)
    return student[:, 0].int().tolist()


def test_one_label_per_example() -> None:
    logits = numbered(4)
    assert chosen(logits, labels=torch.tensor([0, 1, 1, 0])) == [0, 1, 2, 3]
    assert chosen(logits, labels=torch.tensor([[0], [1], [-100], [0]])) == [0, 1, 3]
    assert chosen(logits, attention_mask=torch.ones(4, 7)) == [0, 1, 2, 3]


def test_ignored_labels_are_left_out() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, -100, 0]])
    assert chosen(numbered(2, 3), labels=labels) == [0, 2, 5]
    assert chosen(numbered(2, 3), labels=labels, shift=True) == [1, 4]


def test_padding_is_left_out_without_labels() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert chosen(numbered(2, 3), attention_mask=mask) == [0, 1, 4, 5]
    assert chosen(numbered(2, 3), attention_mask=mask, shift=True) == [0, 4]
    assert chosen(numbered(2, 3), shift=True) == [0, 1, 3, 4]


def test_shapes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(TrainingError, match=r"student's logits have shape \[2, 3, 2\], the teacher's \[2, 3, 4\]"):
        select_positions(torch.zeros(2, 3, 2), torch.zeros(2, 3, 4))
    with pytest.raises(TrainingError, match="logits_to_keep"):
        select_positions(numbered(2, 1), numbered(2, 1), labels=torch.zeros(2, 3))
    with pytest.raises(TrainingError, match=r"attention_mask has shape \[2, 1, 3, 3\]"):
        select_positions(numbered(2, 3), numbered(2, 3), attention_mask=torch.ones(2, 1, 3, 3))
