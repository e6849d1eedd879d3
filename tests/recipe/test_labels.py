"""Which number a label gets."""

import re

import pytest
from datasets import ClassLabel, Dataset, List

from hf_compress import ConfigError
from hf_compress.recipe.labels import number_labels
from hf_compress.recipe.splits import Splits


def splits_of(train: Dataset, evaluation: Dataset | None = None) -> Splits:
    return Splits(train, train if evaluation is None else evaluation, "test")


def numbered(values, feature=None, orders=()):
    data = Dataset.from_dict({"y": values})
    if feature is not None:
        data = data.cast_column("y", feature)
    splits, names = number_labels(splits_of(data), "y", orders)
    return list(splits.train["labels"]), names


def test_numbers_are_ordered_as_numbers_and_texts_as_texts() -> None:
    assert numbered([10, 9, 10]) == ([1, 0, 1], ("9", "10"))
    assert numbered(["b", "a"]) == ([1, 0], ("a", "b"))
    assert numbered([True, False]) == ([1, 0], ("False", "True"))
    assert numbered([-1, 1]) == ([0, 1], ("-1", "1"))


def test_classes_keep_their_numbers_and_hidden_ones_go() -> None:
    classes = ClassLabel(names=["no", "yes"])
    assert numbered([1, -1, 0], classes) == ([1, 0], ("no", "yes"))
    with pytest.raises(ConfigError, match="column 'y' holds no labels"):
        numbered([-1, -1], classes)


def test_a_model_that_knows_the_labels_gives_the_order() -> None:
    orders = [["LABEL_0", "LABEL_1"], ["yes", "no"], ["no", "yes"]]
    assert numbered(["no", "yes"], orders=orders) == ([1, 0], ("yes", "no"))
    assert numbered([0, 1], ClassLabel(names=["no", "yes"]), orders) == ([1, 0], ("yes", "no"))


def test_lists_of_labels() -> None:
    assert numbered([["b", "a"], ["b"]]) == ([[1, 0], [1]], ("a", "b"))
    assert numbered([[1, -100, 0]], List(ClassLabel(names=["x", "y"]))) == ([[1, -100, 0]], ("x", "y"))


def test_a_column_that_is_called_labels_gives_way() -> None:
    data = Dataset.from_dict({"labels": [7, 7], "y": ["a", "b"]})
    splits, names = number_labels(splits_of(data), "y")
    assert splits.train.column_names == ["labels"]
    assert (splits.train["labels"][:], names) == ([0, 1], ("a", "b"))
    assert number_labels(splits_of(data), "labels")[0].train["labels"][:] == [0, 0]


def test_labels_of_both_splits_count() -> None:
    splits = splits_of(Dataset.from_dict({"y": ["b"]}), Dataset.from_dict({"y": ["a", "b"]}))
    found, names = number_labels(splits, "y")
    assert names == ("a", "b")
    assert (list(found.train["labels"]), list(found.evaluation["labels"])) == ([1], [0, 1])


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        (["a"] * 4, ["a"], "warning: all examples are of one class, 'a'"),
        (["a", "b"] * 4, ["a", "c"], "warning: classes that only the evaluation data have.*: c$"),
        ([f"{i}" for i in range(100)], ["1"], "warning: 100 classes in 100 training examples"),
        (["a", "b"] * 4, ["a"], None),
        (["a", "b", None], ["b", None], None),
    ],
)
def test_classes_whose_metrics_would_mean_little_are_noted(train, evaluation, expected) -> None:
    splits = splits_of(Dataset.from_dict({"y": train}), Dataset.from_dict({"y": evaluation}))
    notes = [note for note in number_labels(splits, "y")[0].notes if note.startswith("warning")]
    assert len(notes) == (expected is not None)
    assert all(re.search(expected, note) for note in notes)
