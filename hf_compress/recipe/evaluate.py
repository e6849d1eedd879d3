"""One number that says how good a model is, computed alike for every version of it."""

from collections.abc import Iterable, Mapping
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.recipe.labels import IGNORED, LABELS

METRICS = {
    "text-classification": "accuracy (%)",
    "token-classification": "accuracy of words (%)",
    "causal-lm": "perplexity",
    "seq2seq-lm": "perplexity of targets",
}
"""Task -> what ``evaluate`` returns."""


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Mapping[str, Any]], task: str, device: torch.device) -> float:
    """Return the metric of ``METRICS`` over all batches; the model comes back on the CPU, in eval mode.

    Args:
        model: Returns logits.
        batches: Inputs with ``labels``.
        task: A key of ``METRICS``.
        device: Where to compute.
    """
    model.eval().to(device)
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items()}
        logits, labels = model(**inputs).logits, inputs[LABELS]
        if task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        valid = labels != IGNORED
        value = _correct(logits, labels) if METRICS[task].startswith("accuracy") else _surprise(logits, labels)
        total += float(value)
        count += int(valid.sum())
    model.to("cpu")
    mean = total / max(count, 1)
    return 100 * mean if METRICS[task].startswith("accuracy") else exp(min(mean, 700.0))  # exp(710) overflows


def count_correct(predictions: Any, labels: Any) -> dict[str, float]:
    """Return the accuracy of class numbers; for ``Trainer(compute_metrics=...)``."""
    valid = labels != IGNORED
    return {"accuracy": float((predictions == labels)[valid].mean())}


def best_class(logits: Any, labels: Tensor) -> Tensor:
    """Keep class numbers alone, which take less memory; for ``Trainer(preprocess_logits_for_metrics=...)``."""
    found: Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    return found


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of the labels."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")
