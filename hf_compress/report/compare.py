"""``compare``: one table of a dense model and its compressed versions, measured side by side in one run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_compress.errors import ConfigError, shown
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.latency.timing import DEFAULT_ROUNDS, Progress, median, speedup, time_models, unwrap
from hf_compress.reading import are_texts, is_line, is_number
from hf_compress.report.environment import environment
from hf_compress.report.profile import ModelProfile, profile

DEFAULT_LENGTH = 64
"""Tokens per example in latency measurements."""

UNSTEADY = 0.1
"""By how much a speed-up may differ from the ratio of the latencies before a note says why."""

Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models side by side; the first is the reference of every ratio. Prints as a table."""

    profiles: Mapping[str, ModelProfile]
    """Sizes and costs by model name."""

    latency_ms: Mapping[str, Mapping[str, float]]
    """Label of the inputs -> model name -> median milliseconds of one forward pass."""

    speedup: Mapping[str, Mapping[str, float]]
    """Label of the inputs -> model name -> median over rounds of reference time / own time. Steadier than the ratio of
    ``latency_ms`` where others use the machine; a note says so where they differ."""

    metrics: Mapping[str, Mapping[str, float]]
    """Metric -> model name -> value, as given by ``with_metric``."""

    notes: tuple[str, ...]
    """What a reader of the table has to know."""

    environment: Mapping[str, str]
    """Versions and hardware."""

    def with_metric(self, name: str, values: Mapping[str, float]) -> "Comparison":
        """Return a copy with one more row, such as ``with_metric("accuracy (%)", {"dense": 84.9})``.

        Raises:
            ConfigError: If a value belongs to no model of the table.
        """
        unknown = sorted(set(values) - set(self.profiles))
        if unknown:
            raise ConfigError(
                f"Comparison.with_metric({name!r}): no model is called {unknown[0]!r}; models: {list(self.profiles)}."
            )
        return dataclasses.replace(self, metrics={**self.metrics, name: dict(values)})

    def rows(self) -> list[Row]:
        """Return the table as text: a header row, then one row a quantity."""
        names = list(self.profiles)
        rows: list[Row] = [("", *names)]
        rows += [(metric, *_metric_cells(values, names)) for metric, values in self.metrics.items()]
        for label, read, show in _QUANTITIES:
            rows.append((label, *_cells([read(self.profiles[name]) for name in names], show)))
        for label, times in self.latency_ms.items():
            rows.append((f"latency, {label}", *(f"{times[n]:.2f} ms" if n in times else "-" for n in names)))
        for label, ratios in self.speedup.items():
            rows.append((f"speed-up, {label}", *(f"{ratios[n]:.2f}x" if n in ratios else "-" for n in names)))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for label, *cells in rows:
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([label.ljust(widths[0]), *aligned]))
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *(f"note: {note}" for note in self.notes)])

    def to_markdown(self) -> str:
        """Return a GitHub-flavored markdown table; the notes follow it."""
        header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows()]
        rule = "|" + "|".join(["---", *["---:"] * len(self.profiles)]) + "|"
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([header, rule, *body, *(["", *notes] if notes else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        return {
            "profiles": {name: item.to_dict() for name, item in self.profiles.items()},
            "latency_ms": {label: dict(times) for label, times in self.latency_ms.items()},
            "speedup": {label: dict(ratios) for label, ratios in self.speedup.items()},
            "metrics": {metric: dict(values) for metric, values in self.metrics.items()},
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Comparison":
        """Build a comparison from ``to_dict()`` output.

        Raises:
            ConfigError: If keys are missing or unknown.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"Comparison.from_dict: got {shown(data)}; allowed: a mapping.")
        known = {field.name for field in dataclasses.fields(cls)}
        if set(data) != known:
            wrong = sorted(set(data) ^ known)
            raise ConfigError(f"Comparison.from_dict: keys {wrong} are unknown or missing; allowed: {sorted(known)}.")
        for name, (fits, allowed) in _FIELDS.items():
            if not fits(data[name]):
                raise ConfigError(f"Comparison.from_dict: {name}: got {shown(data[name])}; allowed: {allowed}.")
        profiles = {name: ModelProfile.from_dict(item) for name, item in data["profiles"].items()}
        return cls(**{**data, "profiles": profiles, "notes": tuple(data["notes"])})


def comparison_of_runs(data: Any) -> Comparison:
    """Return what a run has stored: a dense model and a compressed one at least, with something to divide by.

    Raises:
        ConfigError: If it is anything else.
    """
    table = Comparison.from_dict(data)
    if len(table.profiles) < 2 or not all(min(each.parameters, each.flops) > 0 for each in table.profiles.values()):
        raise ConfigError("the comparison lacks a dense and a compressed model with parameters and operations.")
    return table


def _are_models(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(is_line, value))


def _are_rows(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(row, Mapping) and all(map(is_number, row.values())) for row in value.values()
    )


def _are_facts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, str) for each in value.values())


_ROWS = "a mapping of labels to a number for each model"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "profiles": (_are_models, "a profile for each model, by names that are texts of one line"),
    "latency_ms": (_are_rows, _ROWS),
    "speedup": (_are_rows, _ROWS),
    "metrics": (_are_rows, _ROWS),
    "notes": (are_texts, "a list of texts"),
    "environment": (_are_facts, "a mapping of texts to texts"),
}


def _count(value: int) -> str:
    return f"{value / 1e6:.2f} M"


def _operations(value: int) -> str:
    return f"{value / 1e9:.3f} G"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


_QUANTITIES: tuple[tuple[str, Callable[[ModelProfile], int | None], Callable[[int], str]], ...] = (
    ("parameters", lambda p: p.parameters, _count),
    ("encoder parameters", lambda p: p.encoder_parameters, _count),
    ("operations of a forward pass", lambda p: p.flops, _operations),
    ("weights on disk", lambda p: p.measured_bytes or p.bytes_on_disk, _megabytes),
    ("peak memory", lambda p: p.peak_memory, _megabytes),
)


def _cells(values: Sequence[int | None], show: Callable[[int], str]) -> list[str]:
    """Values as text; all but the first with their share of the first."""
    first = values[0]
    cells = []
    for position, value in enumerate(values):
        text = "-" if value is None else show(value)
        cells.append(f"{text} ({value / first:.0%})" if position and value is not None and first else text)
    return cells


def _metric_cells(values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    first = values.get(names[0])
    cells = []
    for position, name in enumerate(names):
        value = values.get(name)
        text = "-" if value is None else f"{value:.2f}"
        cells.append(f"{text} ({value - first:+.2f})" if position and value is not None and first is not None else text)
    return cells


def compare(
    dense: nn.Module,
    small: nn.Module,
    *,
    others: Mapping[str, nn.Module] | None = None,
    names: tuple[str, str] = ("dense", "compressed"),
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    length: int = DEFAULT_LENGTH,
    rounds: int = DEFAULT_ROUNDS,
    directories: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Profile models and time them in turns.

    Args:
        dense: The reference.
        small: Its compressed version.
        others: Further versions by name, such as a quantized one under ``torch.compile``.
        names: What to call ``dense`` and ``small``.
        inputs: Label -> keyword arguments for ``model.forward``; the first are those of the profile. Made from the
            reference's config, one set for each batch size, by default.
        batch_sizes: Examples per batch of the inputs that are made.
        length: Tokens per example of the inputs that are made.
        rounds: How often each latency is measured; the table shows medians.
        directories: Model name -> folder it was saved to, for the real size of its weight files.
        notes: Lines to keep with the table.
        progress: Called with what is being measured.

    Raises:
        ConfigError: If two models share a name, or a directory belongs to no model.
        GraphError: If a model does not run on the inputs.
    """
    models = _named_models(names, (dense, small), others or {}, directories or {})
    chosen = inputs or {f"batch {size}": make_example_inputs(unwrap(dense), size, length) for size in batch_sizes}
    report = progress or (lambda line: None)
    first = next(iter(chosen.values()))
    profiles = {}
    for name, model in models.items():
        report(f"profile of {name}")
        profiles[name] = profile(model, first, latency=False, directory=(directories or {}).get(name))
    latency: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for label, example in chosen.items():
        report(f"latency, {label}")
        times = time_models(models, example, rounds=rounds)
        latency[label] = {name: median(values) for name, values in times.items()}
        ratios[label] = {name: speedup(times[names[0]], values) for name, values in times.items() if name != names[0]}
    return Comparison(
        profiles=profiles,
        latency_ms=latency,
        speedup=ratios,
        metrics={},
        notes=(*notes, *_unsteady(latency, ratios, names[0])),
        environment=environment(),
    )


def _unsteady(
    latency: Mapping[str, Mapping[str, float]], ratios: Mapping[str, Mapping[str, float]], reference: str
) -> list[str]:
    """Say where the medians of the times give another speed-up than the times of each round do."""
    notes = []
    for label, own in ratios.items():
        for name, ratio in own.items():
            apart = latency[label][reference] / latency[label][name]
            if abs(ratio / apart - 1) > UNSTEADY:
                notes.append(
                    f"{label}: the latencies of {reference} and {name} are {apart:.2f} to 1, the speed-up is "
                    f"{ratio:.2f}x, the median of what each round gave; the machine was busy, so measure again when it "
                    "is idle"
                )
    return notes


def _named_models(
    names: tuple[str, str],
    pair: tuple[nn.Module, nn.Module],
    others: Mapping[str, nn.Module],
    directories: Mapping[str, str],
) -> dict[str, nn.Module]:
    models = {**dict(zip(names, pair, strict=True)), **others}
    if len(models) != len(pair) + len(others):
        raise ConfigError(f"compare: names {[*names, *others]} are not distinct; give every model its own name.")
    unknown = sorted(set(directories) - set(models))
    if unknown:
        raise ConfigError(f"compare: directories[{unknown[0]!r}] belongs to no model; models: {list(models)}.")
    return models
