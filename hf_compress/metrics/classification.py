"""``accuracy`` and ``f1`` of class numbers."""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy
from datasets import Features, Value

from hf_compress.errors import ConfigError

AVERAGES = ("binary", "macro", "micro", "weighted")
CLASSES = {"predictions": Value("int64"), "references": Value("int64")}


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of right answers, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their references.",
            citation="",
            inputs_description="predictions, references: class numbers.",
            features=Features(CLASSES),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float((numpy.asarray(predictions) == numpy.asarray(references)).mean())}


class F1(evaluate.Metric):  # type: ignore[misc]
    """Harmonic mean of precision and recall, in [0, 1]; 0 where both are 0 or undefined."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="2 * precision * recall / (precision + recall).",
            citation="",
            inputs_description=(
                "predictions, references: class numbers. average: 'binary' (of the class pos_label, the default), "
                "'macro' (mean over the classes that occur), 'weighted' (by how often each is the reference), or "
                "'micro' (over all decisions, which is the accuracy)."
            ),
            features=Features(CLASSES),
        )

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], average: str = "binary", pos_label: int = 1
    ) -> dict[str, float]:
        if average not in AVERAGES:
            raise ConfigError(f"f1: average: got {average!r}; allowed: {', '.join(AVERAGES)}.")
        given, wanted = numpy.asarray(predictions), numpy.asarray(references)
        if average == "binary":
            return {"f1": _f1(given, wanted, pos_label)}
        if average == "micro":
            return {"f1": float((given == wanted).mean())}
        classes = numpy.union1d(given, wanted)
        values = numpy.array([_f1(given, wanted, each) for each in classes])
        weights = None if average == "macro" else [(wanted == each).sum() for each in classes]
        return {"f1": float(numpy.average(values, weights=weights))}


def _f1(given: Any, wanted: Any, label: int) -> float:
    both = int(((given == label) & (wanted == label)).sum())
    either = int((given == label).sum() + (wanted == label).sum())
    return 2 * both / either if either else 0.0
