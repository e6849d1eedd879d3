"""Loading data sets: from the Hub, from files, from folders."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from hf_compress.config import DatasetConfig
from hf_compress.errors import ConfigError, choices

FILE_BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
FILE_SPLIT = "validation"
"""What an evaluation file's examples are called."""

HELD_OUT = ("test", "validation", "dev")
HELD_OUT_SHARE = 0.1
UNLABELED = -1
"""What data sets hide labels with."""


@dataclass(frozen=True)
class Splits:
    """What to train and to evaluate on."""

    train: Any
    """A ``datasets.Dataset``."""

    evaluation: Any
    """A ``datasets.Dataset``."""

    evaluation_name: str
    """Name of the split that ``evaluation`` comes from."""

    notes: tuple[str, ...] = ()
    """What was done to the data that nobody asked for."""

    references: Any = None
    """What predictions are compared with, where labels do not say it."""

    def named(self) -> dict[str, Any]:
        """Return both by name, for messages."""
        return {"training": self.train, "evaluation": self.evaluation}

    def with_parts(self, train: Any, evaluation: Any, notes: Iterable[str] = (), references: Any = None) -> "Splits":
        """Return other data with the same names; ``notes`` are added."""
        return replace(self, train=train, evaluation=evaluation, notes=(*self.notes, *notes), references=references)

    def map(self, change: Callable[[Any], Any]) -> "Splits":
        """Return what a function makes of the training and of the evaluation data."""
        return self.with_parts(change(self.train), change(self.evaluation), references=self.references)


def load_splits(config: DatasetConfig, label: str | None, seed: int) -> Splits:
    """Load a data set and choose its splits.

    Args:
        config: Where it is; its columns are not looked at.
        label: Column without which, or without values in which, a split is no use for evaluation; None if any is.
        seed: Seed for splitting off evaluation data where there are none, and for choosing training examples.

    Raises:
        ConfigError: If there is no such data set or split, or the evaluation split has no labels.
    """
    splits = _flattened(_load(config), config)
    for name in (config.train_split, config.eval_split):
        if name is not None and name not in splits:
            raise ConfigError(f"dataset {config.path!r}: has no split {name!r}; {choices(name, splits)}.")
    train, evaluation, name = _choose(splits, config, label, seed)
    if config.max_train_examples is not None and config.max_train_examples < len(train):
        train = train.shuffle(seed=seed).select(range(config.max_train_examples))
    if config.max_eval_examples is not None and config.max_eval_examples < len(evaluation):
        evaluation = evaluation.select(range(config.max_eval_examples))
    return Splits(train, evaluation, name)


def drop_incomplete(splits: Splits, columns: Iterable[str]) -> Splits:
    """Check that columns are there, and leave rows out in which one has no value.

    Raises:
        ConfigError: If a column is missing, or no row is left.
    """
    columns = list(columns)
    notes = list(splits.notes)
    parts = []
    for which, part in splits.named().items():
        for column in columns:
            if column not in part.column_names:
                known = choices(column, part.column_names)
                raise ConfigError(f"dataset: no column {column!r} in the {which} data; {known}.")
            if part.num_rows > 0 and all(value is None for value in part[column]):
                raise ConfigError(f"dataset: column {column!r} has no values in the {which} data.")
        complete = [all(v is not None for v in row) for row in zip(*(part[column] for column in columns), strict=True)]
        if not any(complete):
            raise ConfigError(f"dataset: the {which} data have no row with a value in each of {columns}.")
        if not all(complete):
            notes.append(f"{complete.count(False):,} {which} examples without {' or '.join(columns)} were left out")
            part = part.select([i for i, keep in enumerate(complete) if keep])
        parts.append(part)
    return replace(splits, train=parts[0], evaluation=parts[1], notes=tuple(notes))


def _load(config: DatasetConfig) -> Any:
    path = Path(config.path)
    if config.eval_file is not None and not (path.is_file() and Path(config.eval_file).suffix == path.suffix):
        raise ConfigError(
            f"dataset.eval_file: got {config.eval_file!r}; allowed: a file of the same kind as path, which must be a "
            f"file then, not {config.path!r}."
        )
    try:
        if path.suffix in FILE_BUILDERS and path.is_file():
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            files = {"train": str(path), FILE_SPLIT: config.eval_file}
            files = {name: file for name, file in files.items() if file is not None}
            found = load_dataset(FILE_BUILDERS[path.suffix], data_files=files, **options)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = load_from_disk(str(path))
        else:
            found = load_dataset(config.path, config.name)
    except Exception as error:  # whatever the parsers of all formats raise
        for name in (config.path, config.eval_file):
            if name is not None and Path(name).suffix in FILE_BUILDERS and not Path(name).exists():
                raise ConfigError(
                    f"dataset {name!r}: there is no such file, and no such data set on the Hub. Relative paths start "
                    f"at the working directory, {Path.cwd()}."
                ) from error
        raise ConfigError(
            f"dataset {config.path!r}: cannot be loaded from the Hub or from disk: {_cause(error)}"
        ) from error
    return DatasetDict({"train": found}) if isinstance(found, Dataset) else found


def _cause(error: Exception) -> str:
    """Return the first cause that says anything, and what to do about those that are frequent."""
    if "corresponds to no data" in str(error):
        return "it has no rows. Give a file with at least two."
    while isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    remedy = ""
    if isinstance(error, UnicodeDecodeError):
        remedy = ". Save the file as UTF-8"
    elif type(error).__name__ == "EmptyDataError":  # of pandas, which reads CSV
        remedy = ". The file is empty; give one with a row of column names and at least two more"
    elif isinstance(error, ConnectionError):
        remedy = ". Give a folder or a file that is there, or the name of a data set of a Hub that can be reached"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{remedy}"


def _flattened(splits: Any, config: DatasetConfig) -> Any:
    """Make columns of the parts of a column, where a name with a dot asks for one: ``translation.en``."""
    names = [*config.text_columns, config.target_column, config.label_column, config.image_column]
    wanted = {name for name in names if name is not None and "." in name}
    if all(wanted <= set(part.column_names) for part in splits.values()):
        return splits
    return splits.flatten()


def _choose(splits: Any, config: DatasetConfig, label: str | None, seed: int) -> tuple[Any, Any, str]:
    train, wanted = splits[config.train_split], config.eval_split if config.eval_file is None else FILE_SPLIT
    for name in HELD_OUT if wanted is None else (wanted,):
        if name in splits and name != config.train_split and _has_labels(splits[name], label):
            return train, splits[name], name
    if wanted is not None:
        problem = f"holds no labels in {label!r}"
        if wanted == config.train_split:
            problem = "is the training split"
        where = f"split {wanted!r}" if config.eval_file is None else config.eval_file
        raise ConfigError(f"dataset {config.path!r}: {where} {problem}; choose another one to evaluate on.")
    if len(train) < 2:
        raise ConfigError(
            f"dataset {config.path!r}: too few examples ({len(train)}) to hold some out. Give two or more, or an "
            "eval_file."
        )
    parts = train.train_test_split(test_size=HELD_OUT_SHARE, seed=seed)
    return parts["train"], parts["test"], f"held-out {HELD_OUT_SHARE:.0%}"


def _has_labels(data: Any, label: str | None) -> bool:
    if label is None:
        return True
    return label in data.column_names and any(value not in (None, UNLABELED) for value in data[label])
