"""All metrics by name."""

import evaluate

from hf_compress.errors import ConfigError, choices
from hf_compress.metrics.answers import Squad
from hf_compress.metrics.classification import F1, Accuracy
from hf_compress.metrics.footprint import Footprint
from hf_compress.metrics.language import Perplexity, SacreBleu

METRICS: dict[str, type[evaluate.EvaluationModule]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "footprint": Footprint,
    "perplexity": Perplexity,
    "sacrebleu": SacreBleu,
    "squad": Squad,
}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Return a module of the ``evaluate`` library that needs no download: ``load_metric("f1").compute(...)``.

    Args:
        name: "accuracy", "f1", "footprint", "perplexity", "sacrebleu" or "squad".

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in METRICS:
        raise ConfigError(f"load_metric: there is no metric {name!r}; {choices(name, METRICS)}.")
    return METRICS[name](keep_in_memory=True)
