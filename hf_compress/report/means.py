"""What runs of one recipe under several seeds come to on average."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from hf_compress.report.markup import Markup
from hf_compress.report.tables import plain_table
from hf_compress.report.tradeoff import Measured

SEEDS = ("seed", "data_seed")
UNEQUAL = ("output",)
"""Settings in which runs of one recipe may differ, beside seeds."""


def means_table(models: Sequence[Measured], settings: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """Return a table of means and standard deviations, or None if no two runs differ in seeds alone.

    Args:
        models: Of all runs.
        settings: Name of a run -> its recipe's settings by their whole names, such as ``training.seed``.
    """
    groups: dict[str, list[str]] = {}
    for run, values in settings.items():
        same = {key: value for key, value in values.items() if not _is_free(key)}
        groups.setdefault(repr(sorted(same.items(), key=lambda item: item[0])), []).append(run)
    metrics = list(dict.fromkeys(metric for each in models for metric in each.comparison.metrics))
    rows = []
    for runs in groups.values():
        own = [each for each in models if each.run in runs] if len(runs) > 1 else []
        for name in dict.fromkeys(each.name for each in own):
            several = [each for each in own if each.name == name]
            row = [", ".join(each.run for each in several), name, str(len(several))]
            row += [_spread([each.metric(metric) for each in several]) for metric in metrics]
            rows.append([*row, f"{mean(each.profile.parameters for each in several) / 1e6:.2f} M"])
    header = ["runs", "model", "number of runs", *metrics, "parameters"]
    return plain_table("Means over seeds", header, rows, text_columns=2) if rows else None


def _is_free(key: str) -> bool:
    return key in UNEQUAL or key.rpartition(".")[2] in SEEDS


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.2f}" if known else "-"
    return f"{mean(known):.2f} \u00b1 {stdev(known):.2f}"
