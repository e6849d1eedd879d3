"""``squad``: how well answers that are parts of a text match those that people marked.

Exact match and F1 of words, after case, punctuation and articles are dropped (Rajpurkar et al. 2016, "SQuAD: 100,000+
Questions for Machine Comprehension of Text"); no answer matches none (Rajpurkar et al. 2018, SQuAD 2.0).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Squad(evaluate.Metric):  # type: ignore[misc]
    """Exact match and F1 in [0, 100], each the mean over questions of the best reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match and F1 of answers.",
            citation="https://arxiv.org/abs/1606.05250",
            inputs_description="predictions: texts, '' for no answer. references: lists of texts, empty for no answer.",
            features=Features({"predictions": Value("string"), "references": ListOf(Value("string"))}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        exact = f1 = 0.0
        for given, wanted in zip(predictions, references, strict=True):
            answers = list(wanted) or [""]
            exact += max(float(normalized(given) == normalized(each)) for each in answers)
            f1 += max(f1_of_words(given, each) for each in answers)
        count = max(len(predictions), 1)
        return {"exact_match": 100 * exact / count, "f1": 100 * f1 / count}


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1_of_words(given: str, wanted: str) -> float:
    """Return the F1 of two texts as bags of words, in [0, 1]; 1 if neither has any."""
    ours, theirs = normalized(given).split(), normalized(wanted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
