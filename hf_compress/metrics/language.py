"""``perplexity`` of texts whose log-likelihoods are known, and ``sacrebleu`` of translations."""

from collections.abc import Sequence
from math import exp

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from hf_compress.errors import ConfigError

LARGEST_EXPONENT = 700.0
"""exp(710) overflows."""


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """exp of the mean negative log-likelihood of a token, in nats; at least 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp(sum of negative log-likelihoods / number of tokens).",
            citation="",
            inputs_description="predictions: sums of negative log-likelihoods, in nats. references: numbers of tokens.",
            features=Features({"predictions": Value("float64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        tokens = sum(references)
        if tokens < 1:
            raise ConfigError("perplexity: there is no token to predict.")
        return {"perplexity": exp(min(sum(predictions) / tokens, LARGEST_EXPONENT))}


class SacreBleu(evaluate.Metric):  # type: ignore[misc]
    """BLEU in [0, 100], by the sacrebleu package (Post 2018, "A Call for Clarity in Reporting BLEU Scores")."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU with sacrebleu's standard tokenization.",
            citation="https://aclanthology.org/W18-6319",
            inputs_description="predictions: texts. references: one text, or a list of as many for each.",
            features=[
                Features({"predictions": Value("string"), "references": ListOf(Value("string"))}),
                Features({"predictions": Value("string"), "references": Value("string")}),
            ],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: str = "13a"
    ) -> dict[str, float | str]:
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError as error:
            raise ConfigError("sacrebleu: the package is not installed; pip install 'hf-compress[bleu]'.") from error
        several = [[each] if isinstance(each, str) else list(each) for each in references]
        counts = {len(each) for each in several}
        if len(counts) != 1:
            raise ConfigError(f"sacrebleu: references: got {sorted(counts)} for a text; allowed: equally many for all.")
        bleu = BLEU(tokenize=tokenize)
        found = bleu.corpus_score(list(predictions), [list(each) for each in zip(*several, strict=True)])
        return {"bleu": float(found.score), "signature": str(bleu.get_signature())}
