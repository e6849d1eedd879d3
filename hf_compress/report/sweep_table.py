"""The models of a sweep in one table: means over seeds, how far seeds lie apart, and the dense model beside them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_compress.config.sweep import ENCODER_SPARSITY, SPARSITY
from hf_compress.errors import ConfigError, choices
from hf_compress.report.compare import Comparison
from hf_compress.report.profile import ModelProfile

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"

Read = Callable[[Comparison, str], float | None]
"""(comparison, name of a model in it) -> a quantity of the model, or None if it was not measured."""


@dataclass(frozen=True)
class Statistic:
    """One quantity over the seeds of a run."""

    mean: float

    spread: float
    """Standard deviation (n - 1), 0 of one seed."""

    def text(self, show: Callable[[float], str]) -> str:
        """Return the mean, and the spread where there is one."""
        spread = f" {PLUS_MINUS} {show(self.spread).lstrip('+')}" if self.spread else ""
        return f"{show(self.mean)}{spread}"


@dataclass(frozen=True)
class SweepRow:
    """One model of a run: the same settings with each seed."""

    label: str
    run: str

    model: str
    """Its name in the comparisons."""

    seeds: Mapping[int, Comparison]
    """Seed -> what the run measured."""

    def statistic(self, read: Read) -> Statistic | None:
        """Return a quantity over the seeds, or None if it was not measured for all of them."""
        found = [read(comparison, self.model) for comparison in self.seeds.values()]
        values = [value for value in found if value is not None]
        if not values or len(values) < len(found):
            return None
        return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def size(kind: str) -> Read:
    """Return what reads a size, one of ``SIZES`` of ``SweepConfig``."""
    readers: dict[str, Read] = {
        SPARSITY: lambda table, model: _sparsity(table, model, lambda p: p.parameters),
        ENCODER_SPARSITY: lambda table, model: _sparsity(table, model, lambda p: p.encoder_parameters),
        "parameters": lambda table, model: table.profiles[model].parameters,
        "flops": lambda table, model: table.profiles[model].flops,
        "latency": lambda table, model: next(iter(table.latency_ms.values()))[model],
    }
    return readers[kind]


def metric(name: str) -> Read:
    """Return what reads a metric."""
    return lambda table, model: table.metrics.get(name, {}).get(model)


def difference(name: str) -> Read:
    """Return what reads how far a metric is from that of the dense model of the same run."""

    def read(table: Comparison, model: str) -> float | None:
        values = table.metrics.get(name, {})
        dense = values.get(dense_name(table))
        own = None if model == dense_name(table) else values.get(model)
        return None if dense is None or own is None else own - dense

    return read


def dense_name(table: Comparison) -> str:
    """Return the name of the model that the others are compared with."""
    return next(iter(table.profiles))


def _sparsity(table: Comparison, model: str, count: Callable[[ModelProfile], int | None]) -> float | None:
    dense, left = count(table.profiles[dense_name(table)]), count(table.profiles[model])
    return None if not dense or left is None else (dense - left) / dense


@dataclass(frozen=True)
class SweepTable:
    """All finished runs of a sweep; prints as a table."""

    rows: Sequence[SweepRow]

    def dense(self) -> SweepRow:
        """Return the model before compression, as the first run with each seed measured it."""
        seeds: dict[int, Comparison] = {}
        for row in self.rows:
            seeds = {**row.seeds, **seeds}
        return SweepRow("dense", "dense", dense_name(next(iter(seeds.values()))), dict(sorted(seeds.items())))

    def metric_names(self) -> list[str]:
        """Return the metrics of all runs."""
        tables = [table for row in self.rows for table in row.seeds.values()]
        return list(dict.fromkeys(name for table in tables for name in table.metrics))

    def find_metric(self, name: str | None) -> str:
        """Return the name of the metric that tells how good a model is.

        Args:
            name: It, or None for the first.

        Raises:
            ConfigError: If the runs have no such metric.
        """
        known = self.metric_names()
        if name is not None and name not in known:
            raise ConfigError(f"SweepConfig.metric: the runs have no metric {name!r}; {choices(name, known)}.")
        return known[0] if name is None else name

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table as text: a header row, the dense model, then a row a model."""
        columns = self._columns()
        found = [("run", "seeds", *columns)]
        for row in (self.dense(), *self.rows):
            texts = []
            for read, show in columns.values():
                statistic = row.statistic(read)
                texts.append("-" if statistic is None else statistic.text(show))
            found.append((row.label, str(len(row.seeds)), *texts))
        return found

    def to_markdown(self) -> str:
        """Return a GitHub-flavored markdown table."""
        header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.cells()]
        return "\n".join([header, "|" + "|".join(["---", *["---:"] * (header.count(" | "))]) + "|", *body])

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def _columns(self) -> dict[str, tuple[Read, Callable[[float], str]]]:
        columns: dict[str, tuple[Read, Callable[[float], str]]] = {
            "sparsity": (size(SPARSITY), _percent),
            "encoder sparsity": (size(ENCODER_SPARSITY), _percent),
            "parameters": (size("parameters"), lambda value: f"{value / 1e6:.2f} M"),
            "operations": (size("flops"), lambda value: f"{value / 1e9:.3f} G"),
        }
        first = next(iter(self.dense().seeds.values()))
        for label in first.latency_ms:
            columns[f"latency, {label}"] = (_timed("latency_ms", label), lambda value: f"{value:.2f} ms")
        for label in first.speedup:
            columns[f"speed-up, {label}"] = (_timed("speedup", label), lambda value: f"{value:.2f}x")
        for name in self.metric_names():
            columns[name] = (metric(name), lambda value: f"{value:.2f}")
            columns[f"{name} - dense"] = (difference(name), lambda value: f"{value:+.2f}")
        return columns


def _timed(field: str, label: str) -> Read:
    return lambda table, model: getattr(table, field).get(label, {}).get(model)


def _percent(value: float) -> str:
    return f"{value:.1%}"
