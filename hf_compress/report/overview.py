"""The sections of the page about several runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_compress.report.folders import RunFolder
from hf_compress.report.markup import Content, tag
from hf_compress.report.means import means_table
from hf_compress.report.sections import HINT, Section, absent, mark_of, measured, tradeoff_panels
from hf_compress.report.tables import bullets, pairs, plain_table, with_share
from hf_compress.report.tradeoff import Measured

WHERE = ("output",)
"""Settings in which all recipes differ and that say nothing."""


def overview_summary(runs: Mapping[str, RunFolder]) -> str:
    """Return a sentence about what is there."""
    models = _models(runs)
    dense = sum(each.profile is each.reference for each in models)
    return (
        f"{len(runs)} finished runs left {len(models) - dense} compressed models. The table lists each of them beside "
        "the dense model of its own run; the charts show what quality costs over all runs together."
    )


def overview_sections(
    runs: Mapping[str, RunFolder], unfinished: Sequence[str], damaged: Sequence[str] = ()
) -> list[Section]:
    """Return the sections.

    Args:
        runs: Finished ones, by the name of their folder.
        unfinished: Folders that hold a recipe and no result.
        damaged: What is wrong with the runs that are not shown.
    """
    models = _models(runs)
    means = means_table(models, _flat_settings(runs))
    over_seeds = [
        tag("p", "Runs whose recipes differ in seeds alone: the mean, and the standard deviation between runs."),
        means,
    ]
    hint = f"Numbers are those of the table, marks those of its runs. A line joins models of one seed only. {HINT}"
    return [
        Section(key="models", title="All models", body=_table(models)),
        *([Section(key="means", title="Means over seeds", body=over_seeds)] if means is not None else []),
        Section(key="tradeoff", title="Quality and cost", body=tradeoff_panels(models, hint)),
        Section(key="settings", title="Where the recipes differ", body=_settings(runs)),
        Section(key="environment", title="Environment", body=_environments(runs)),
        Section(key="notes", title="Notes", body=_notes(runs, unfinished, damaged)),
    ]


def _models(runs: Mapping[str, RunFolder]) -> list[Measured]:
    found: list[Measured] = []
    for group, run in enumerate(runs.values()):
        found += measured(run, first=len(found) + 1, group=group)
    return found


def _table(models: Sequence[Measured]) -> Content:
    metrics = _union(each.comparison.metrics for each in models)
    latencies = _union(each.comparison.latency_ms for each in models)
    speedups = _union(each.comparison.speedup for each in models)
    header = ["number", "run", "model", *metrics, "parameters", "operations", "weights on disk"]
    header += [f"latency, {label}" for label in latencies] + [f"speed-up, {label}" for label in speedups]
    rows = []
    for each in models:
        own, dense = each.profile, each.reference
        row: list[Content] = [[f"{each.number} ", mark_of(each)], each.run, each.name]
        row += [_shown(each.metric(name), ".2f") for name in metrics]
        row.append(with_share(f"{own.parameters / 1e6:.2f} M{_share(own.parameters, dense.parameters)}"))
        row.append(with_share(f"{own.flops / 1e9:.3f} G{_share(own.flops, dense.flops)}"))
        row.append(f"{(own.measured_bytes or own.bytes_on_disk) / 1e6:.1f} MB")
        row += [_shown(each.latency(label), ".2f", " ms") for label in latencies]
        row += [_shown(each.comparison.speedup.get(label, {}).get(each.name), ".2f", "x") for label in speedups]
        rows.append(row)
    return plain_table("All models", header, rows, text_columns=3)


def _flat_settings(runs: Mapping[str, RunFolder]) -> dict[str, dict[str, Any]]:
    return {name: _flat(run.recipe.to_dict()) for name, run in runs.items() if run.recipe is not None}


def _settings(runs: Mapping[str, RunFolder]) -> Content:
    flat = _flat_settings(runs)
    keys = _union(flat.values())
    differing = [
        key for key in keys if key not in WHERE and len({repr(settings.get(key)) for settings in flat.values()}) > 1
    ]
    if not differing:
        return absent("In no setting that is stored.")
    rows = [[name, *(_setting(settings, key) for key in differing)] for name, settings in flat.items()]
    return plain_table("Settings in which the recipes differ", ["run", *differing], rows)


def _environments(runs: Mapping[str, RunFolder]) -> Content:
    known = {name: run.comparison.environment for name, run in runs.items() if run.comparison is not None}
    keys = _union(known.values())
    found = {key: list(dict.fromkeys(each.get(key, "unknown") for each in known.values())) for key in keys}
    same = {key: values[0] for key, values in found.items() if len(values) == 1}
    different = [key for key, values in found.items() if len(values) > 1]
    if not different:
        return pairs(same)
    rows = [[name, *(each.get(key, "unknown") for key in different)] for name, each in known.items()]
    warning = "Not all runs were measured alike, so their latencies and sizes may not compare:"
    return [tag("p", warning), plain_table("Where environments differ", ["run", *different], rows), pairs(same)]


def _notes(runs: Mapping[str, RunFolder], unfinished: Sequence[str], damaged: Sequence[str]) -> Content:
    lines = [*damaged]
    lines += [f"{name}: holds a recipe and no result, so the run is not finished and not shown." for name in unfinished]
    lines.append("hf-compress report, given the folder of one run, shows its layers, its curves and its recipe.")
    lines += [note for run in runs.values() if run.comparison is not None for note in run.comparison.notes]
    return bullets(list(dict.fromkeys(lines)))


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names: ``pruning.structures.heads``."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        inner: Any = (
            value if isinstance(value, Mapping) else dict(enumerate(value, 1)) if _has_sections(value) else None
        )
        found |= {prefix + str(key): value} if inner is None else _flat(inner, f"{prefix}{key}.")
    return found


def _has_sections(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(each, Mapping) for each in value)


def _setting(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    return "-" if value is None else str(value)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _share(own: int, dense: int) -> str:
    return f" ({own / dense:.0%})" if dense else ""
