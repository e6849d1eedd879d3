import pytest
import torch
from torch import Tensor

from hf_compress.distillation.positions import check_same_shape, counted_positions
from hf_compress.errors import TrainingError


def chosen(*shape: int, **options: object) -> list[int]:
    """Flat indices of the positions that count; two classes."""
    counted = counted_positions(torch.zeros(*shape, 2), **options)
    assert counted.dtype == torch.bool and counted.shape == shape
    return counted.flatten().nonzero().flatten().tolist()


def test_one_label_per_example() -> None:
    assert chosen(4, labels=torch.tensor([0, 1, 1, 0])) == [0, 1, 2, 3]
    assert chosen(4, labels=torch.tensor([[0], [1], [-100], [0]])) == [0, 1, 3]
    assert chosen(4, attention_mask=torch.ones(4, 7)) == [0, 1, 2, 3]


def test_ignored_labels_are_left_out() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, -100, 0]])
    assert chosen(2, 3, labels=labels) == [0, 2, 5]
    assert chosen(2, 3, labels=labels, shift=True) == [1, 4]


def test_padding_is_left_out_without_labels() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert chosen(2, 3, attention_mask=mask) == [0, 1, 4, 5]
    assert chosen(2, 3, attention_mask=mask, shift=True) == [0, 4]
    assert chosen(2, 3, shift=True) == [0, 1, 3, 4]


def test_shapes_that_do_not_fit_are_errors() -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape)

    check_same_shape(zeros(2, 3, 2), zeros(2, 3, 2))
    with pytest.raises(TrainingError, match=r"student's logits have shape \[2, 3, 2\], the teacher's \[2, 3, 4\]"):
        check_same_shape(zeros(2, 3, 2), zeros(2, 3, 4))
    with pytest.raises(TrainingError, match="logits_to_keep"):
        counted_positions(zeros(2, 1, 2), labels=zeros(2, 3))
    with pytest.raises(TrainingError, match=r"attention_mask has shape \[2, 1, 3, 3\]"):
        counted_positions(zeros(2, 3, 2), attention_mask=torch.ones(2, 1, 3, 3))
