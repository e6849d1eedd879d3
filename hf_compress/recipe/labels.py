"""Labels of any type become numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel

from hf_compress.errors import ConfigError
from hf_compress.recipe.splits import UNLABELED, Splits, drop_incomplete

IGNORED = -100
"""The label of a position that has none."""

LABELS = "labels"
"""The column of numbers."""

_TEMPORARY = "__hf_compress_labels"


@dataclass(frozen=True)
class _Column:
    """How a column stores labels."""

    names: Sequence[str] | None
    """Names of the classes whose numbers are stored, or None if names are."""

    is_list: bool
    """Whether a row has a list of them."""

    def read(self, value: Any) -> Any:
        """Return the name of a stored label, or the label itself; None if there is none."""
        if value is None or (self.is_list and value == IGNORED):
            return None
        if self.names is None:
            return value
        return None if value == UNLABELED else self.names[value]


def number_labels(
    splits: Splits, column: str, orders: Iterable[Sequence[str]] = (), *, per_word: bool = True
) -> tuple[Splits, tuple[str, ...]]:
    """Replace a column of labels by ``LABELS``, numbers from 0 on; rows without a label are left out.

    Args:
        splits: Data that have the column.
        column: Holds classes, numbers or texts, or lists of them, one for each word.
        orders: The first of these that consists of the data's labels gives the order: that of a model that knows them.

        per_word: Whether lists are such; otherwise an example has one class.

    Returns:
        The data, and the names of the labels.

    Raises:
        ConfigError: If labels are no classes, or there are none.
    """
    how = _describe(splits.train.features[column], column)
    if how.is_list and not per_word:
        raise ConfigError(
            f"dataset: column {column!r} holds lists of labels; one class for each example is needed. Name another "
            "label_column; models with several labels for an example are trained with a Trainer and the callbacks."
        )
    read = {which: [_read(how, value) for value in part[column]] for which, part in splits.named().items()}
    names = how.names
    if names is None:
        # The names of numbers in the order of the numbers: "10" comes after "9".
        found = {label for rows in read.values() for row in rows for label in (row if how.is_list else [row])}
        names = [str(label) for label in sorted(found - {None}, key=lambda label: (str(type(label)), label))]
    names = next((list(order) for order in orders if sorted(order) == sorted(names)), list(names))
    numbers = {name: number for number, name in enumerate(names)}
    parts = []
    for which, part in splits.named().items():
        values = [
            [IGNORED if each is None else numbers[str(each)] for each in row]
            if how.is_list and row is not None
            else (None if row is None else numbers[str(row)])
            for row in read[which]
        ]
        # In this order: a data set that loses its last column has no rows left.
        added = part.add_column(_TEMPORARY, values)
        added = added.remove_columns([name for name in {column, LABELS} if name in part.column_names])
        parts.append(added.rename_column(_TEMPORARY, LABELS))
    notes = () if how.is_list else _doubts(read["training"], read["evaluation"])
    numbered = replace(splits, train=parts[0], evaluation=parts[1], notes=(*splits.notes, *notes))
    try:
        return drop_incomplete(numbered, [LABELS]), tuple(names)
    except ConfigError as error:
        raise ConfigError(f"dataset: column {column!r} holds no labels: {error}") from error


def _doubts(train: Sequence[Any], evaluation: Sequence[Any]) -> list[str]:
    """Say why the metrics of such classes would mean little."""
    known, asked = ({each for each in labels if each is not None} for labels in (train, evaluation))
    notes = []
    if len(known | asked) == 1:
        notes.append(f"warning: all examples are of one class, {min(known | asked)!r}, so there is nothing to learn")
    untrained = sorted(map(str, asked - known))
    if untrained:
        some = f"{', '.join(untrained[:5])}{', ...' if len(untrained) > 5 else ''}"
        notes.append(f"warning: classes that only the evaluation data have, so that no example trains them: {some}")
    examples = sum(each is not None for each in train)
    if len(known) > 2 and examples < 2 * len(known):
        notes.append(
            f"warning: {len(known):,} classes in {examples:,} training examples, fewer than two of each; is the column "
            "of labels the right one?"
        )
    return notes


def _read(how: _Column, value: Any) -> Any:
    if how.is_list and value is not None:
        return [how.read(each) for each in value]
    return how.read(value)


def _describe(feature: Any, column: str) -> _Column:
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return _Column(inner.names, inner is not feature)
    dtype = str(getattr(inner, "dtype", inner))
    if not dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        raise ConfigError(f"dataset: column {column!r} holds {dtype} values; class labels are needed.")
    return _Column(None, inner is not feature)
