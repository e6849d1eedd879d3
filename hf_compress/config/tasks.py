"""The tasks that a recipe can train, and the columns that each reads."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskColumns:
    """What a task reads from a row of data."""

    num_texts: tuple[int, ...] = ()
    """How many columns of text there may be; none for images."""

    label: str | None = None
    """Name by default of the column of labels, or None if the task has none."""

    has_target: bool = False
    """Whether there is a column of texts to write."""

    has_image: bool = False
    """Whether there is a column of images."""


TASK_COLUMNS: dict[str, TaskColumns] = {
    "text-classification": TaskColumns(num_texts=(1, 2), label="label"),
    "token-classification": TaskColumns(num_texts=(1,), label="labels"),
    "question-answering": TaskColumns(num_texts=(2,), label="answers"),
    "image-classification": TaskColumns(label="label", has_image=True),
    "causal-lm": TaskColumns(num_texts=(1,)),
    "seq2seq-lm": TaskColumns(num_texts=(1,), has_target=True),
}

TASKS = tuple(TASK_COLUMNS)
"""The tasks that a recipe can train."""
