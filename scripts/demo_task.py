"""The demo's task: text classification on any data set, from loading to predicting."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT = ("test", "validation", "dev")
HELD_OUT_SHARE = 0.1
UNLABELED = -1
EVALUATION_BATCH = 32

Splits = tuple[Dataset, Dataset, str]
"""Training data, evaluation data, name of the latter."""


class TaskError(ValueError):
    """A data set that cannot be used for text classification as it was given."""


@dataclass(frozen=True)
class Task:
    """Tokenized data with ``input_ids``, ``attention_mask``, ..., ``labels`` and ``length``."""

    train: Dataset
    test: Dataset
    labels: tuple[str, ...]
    test_split: str
    """Name of the split that ``test`` comes from."""

    fingerprint: str
    """Hash of texts and labels of ``train``."""

    def model_options(self) -> dict[str, Any]:
        """Arguments that say how many labels a model has and what they are called."""
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}}


def load_splits(name: str, config: str | None, label: str, test_split: str | None, seed: int) -> Splits:
    """Load a data set from the Hub, a file or a folder.

    Args:
        name: Hub name, file, or folder written by ``save_to_disk``.
        config: Configuration of a Hub data set, or None.
        label: The label column; a split without labels is not used for evaluation.
        test_split: Split to evaluate on; the first of ``HELD_OUT`` that has labels by default.
        seed: Seed for splitting off evaluation data where there are none.

    Returns:
        The training split, the evaluation split, and the latter's name.

    Raises:
        TaskError: If there is no such data set or split.
    """
    splits = _load(name, config)
    wanted = ["train"] if test_split is None else ["train", test_split]
    missing = [split for split in wanted if split not in splits]
    if missing:
        raise TaskError(f"--dataset {name}: has no split {missing[0]!r}, only {sorted(splits)}.")
    for split in HELD_OUT if test_split is None else (test_split,):
        if split in splits and _has_labels(splits[split], label):
            return splits["train"], splits[split], split
    if test_split is not None:
        raise TaskError(f"--test-split {test_split}: column {label!r} holds no labels.")
    parts = splits["train"].train_test_split(test_size=HELD_OUT_SHARE, seed=seed)
    return parts["train"], parts["test"], f"held-out {HELD_OUT_SHARE:.0%}"


def _load(name: str, config: str | None) -> DatasetDict:
    path = Path(name)
    try:
        if path.suffix in FILE_BUILDERS and path.is_file():
            options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            splits = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), **options)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = load_from_disk(str(path))
        else:
            splits = load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(f"--dataset {name}: cannot be loaded from the Hub or from disk: {error}") from error
    return DatasetDict({"train": splits}) if isinstance(splits, Dataset) else splits


def _has_labels(data: Dataset, label: str) -> bool:
    return label in data.column_names and any(value not in (None, UNLABELED) for value in data.unique(label))


def prepare(
    splits: Splits,
    columns: tuple[str, str | None, str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Task:
    """Check the columns, number the labels and tokenize.

    Args:
        splits: What ``load_splits`` returned.
        columns: Names of the text column, of the second text's column or None, of the label column.
        tokenizer: The model's tokenizer.
        max_length: Longer texts are cut to this many tokens.

    Raises:
        TaskError: If a column is missing, labels are no classes, or the evaluation data have no labels.
    """
    train, test, split = splits
    text, pair, label = columns
    for column in (text, pair, label):
        if column is not None and column not in train.column_names:
            raise TaskError(f"no column {column!r} in the data; columns: {train.column_names}.")
    train, test, labels = _numbered_labels(train, test, label)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pairs = (rows[text],) if pair is None else (rows[text], rows[pair])
        encoded = dict(tokenizer(*pairs, truncation=True, max_length=max_length))
        return {**encoded, "labels": rows[label], "length": [len(ids) for ids in encoded["input_ids"]]}

    kept = [column for column in (text, pair, label) if column is not None]
    fingerprint = _fingerprint(train.select_columns(kept))
    tokenized = [part.map(tokenize, batched=True, remove_columns=part.column_names) for part in (train, test)]
    return Task(tokenized[0], tokenized[1], labels, split, fingerprint)


def _numbered_labels(train: Dataset, test: Dataset, label: str) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    feature = train.features[label]
    if not isinstance(feature, ClassLabel):
        if str(getattr(feature, "dtype", feature)).startswith("float"):
            raise TaskError(f"column {label!r} holds {feature.dtype} numbers; class labels are needed.")
        names = sorted({str(value) for value in [*train[label], *test[label]]})
        feature = ClassLabel(names=names)
        numbers = {name: number for number, name in enumerate(names)}

        def number(row: dict[str, Any]) -> dict[str, Any]:
            return {label: numbers[str(row[label])]}

        train, test = (part.map(number).cast_column(label, feature) for part in (train, test))
    train = train.filter(lambda row: row[label] is not None and row[label] != UNLABELED)
    test = test.filter(lambda row: row[label] is not None and row[label] != UNLABELED)
    if len(test) == 0 or len(train) == 0:
        raise TaskError(
            f"column {label!r} has no labels in the {'training' if len(test) else 'evaluation'} data."
        )
    return train, test, tuple(feature.names)


def _fingerprint(data: Dataset) -> str:
    digest = hashlib.sha256()
    for row in data:
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def evaluation_batches(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield (inputs, number of real examples) in batches that all have one shape, so that one compilation does."""
    columns = [name for name in data.column_names if name not in ("labels", "length")]
    for start in range(0, len(data), EVALUATION_BATCH):
        rows = data[start : start + EVALUATION_BATCH]
        real = len(rows["input_ids"])
        features = [{name: rows[name][i % real] for name in columns} for i in range(EVALUATION_BATCH)]
        batch = tokenizer.pad(features, padding="max_length", max_length=max_length, return_tensors="pt")
        yield dict(batch), real


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[tuple[dict[str, Tensor], int]], title: str) -> Tensor:
    """Return the logits [examples, labels] of all batches."""
    logits = []
    for inputs, real in track(list(batches), description=title):
        logits.append(model(**inputs).logits[:real].float().clone())
    return torch.cat(logits)


def accuracy(logits: Tensor, data: Dataset) -> float:
    """Return the percentage of correct predictions."""
    return float((logits.argmax(-1) == torch.tensor(data["labels"])).float().mean() * 100)
