"""The demo's task: text classification on any data set, from numbering labels to predicting."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_compress.recipe.labels import number_labels
from hf_compress.recipe.splits import Splits, drop_incomplete

EVALUATION_BATCH = 32


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
        ConfigError: If a column is missing, labels are no classes, or the evaluation data have no labels.
    """
    text, pair, label = columns
    texts = [column for column in (text, pair) if column is not None]
    splits, labels = number_labels(drop_incomplete(splits, [*texts, label]), label)
    train, test = splits.train, splits.evaluation

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pairs = (rows[text],) if pair is None else (rows[text], rows[pair])
        encoded = dict(tokenizer(*pairs, truncation=True, max_length=max_length))
        return {**encoded, "labels": rows["labels"], "length": [len(ids) for ids in encoded["input_ids"]]}

    fingerprint = _fingerprint(train.select_columns([*texts, "labels"]))
    tokenized = [part.map(tokenize, batched=True, remove_columns=part.column_names) for part in (train, test)]
    return Task(tokenized[0], tokenized[1], labels, splits.evaluation_name, fingerprint)


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
