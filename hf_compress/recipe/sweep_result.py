"""What a sweep leaves behind: every run's numbers as data, one table, one chart."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.config import SweepConfig
from hf_compress.config.sweep import SIZES
from hf_compress.reading import write_new
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.stages import SMALL
from hf_compress.recipe.sweep_plan import PlannedRun
from hf_compress.report.compare import Comparison
from hf_compress.report.pareto import plot_pareto
from hf_compress.report.references import reference_curves
from hf_compress.report.sweep_chart import front_labels, is_maximized, sweep_chart
from hf_compress.report.sweep_table import SweepRow, SweepTable, dense_name, size

JSON_FILE = "sweep.json"
TABLE_FILE = "sweep.md"
CHART_FILE = "pareto.png"


@dataclass(frozen=True)
class FailedRun:
    """Why a run did not finish."""

    error: str
    """The message."""

    traceback: str | None = None
    """Of an error that is not one of the package's own."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Where everything is, and how good and small the models are; prints as a summary."""

    config: SweepConfig
    """The sweep as it was asked for."""

    output: Path
    """The sweep's output folder."""

    planned: Sequence[PlannedRun] = ()
    """All runs that were begun, in their order."""

    finished: Mapping[str, RunResult] = field(default_factory=dict)
    """Name of a run's folder -> what it left."""

    failed: Mapping[str, FailedRun] = field(default_factory=dict)
    """Name of a run's folder, or of a trial that could not be made a recipe -> why it did not finish."""

    best: Sequence[str] = ()
    """Names of the best trials of a search."""

    previews: Mapping[str, RunResult] = field(default_factory=dict)
    """Name of a run -> what it would do, after a dry run."""

    def table(self) -> SweepTable:
        """Return all models beside each other, those of a run's seeds as one."""
        rows: dict[tuple[str, str], dict[int, Comparison]] = {}
        for run in self.planned:
            result = self.finished.get(run.key)
            comparison = None if result is None else result.comparison
            if result is None or comparison is None:
                continue
            for model in result.folders:
                if model == SMALL or model.startswith(f"{SMALL}-"):
                    rows.setdefault((run.name, model), {})[run.seed] = comparison
        return SweepTable(
            [
                SweepRow(run if model == SMALL else f"{run}, {model.removeprefix(f'{SMALL}-')}", run, model, seeds)
                for (run, model), seeds in rows.items()
            ]
        )

    def save(self) -> None:
        """Write ``sweep.json``, and ``sweep.md`` and ``pareto.png`` if any run has finished.

        Raises:
            ConfigError: If the models lack what the chart is to show.
        """
        data: dict[str, Any] = {"x": self.config.x, "runs": [self._record(run) for run in self.planned]}
        data["failed"] = {name: asdict(each) for name, each in self.failed.items()}
        table = self.table()
        if table.rows:
            recipe = self.planned[0].recipe
            chart = sweep_chart(table, self.config, recipe)
            data |= {
                "metric": chart.y_label,
                "direction": "maximize" if is_maximized(self.config, chart.y_label) else "minimize",
                "front": front_labels(chart),
                "best_trials": list(self.best),
                "references": [
                    {
                        "label": curve.label,
                        "source": curve.source,
                        "url": curve.url,
                        "shown": curve.label in chart.curves,
                    }
                    for curve in reference_curves(recipe, chart.y_label)
                ],
            }
            picture = self.output / CHART_FILE
            os.replace(plot_pareto(chart, picture.with_name(f"partial-{picture.name}")), picture)
            write_new(self.output / TABLE_FILE, f"{self._markdown(table)}\n")
        write_new(self.output / JSON_FILE, json.dumps(data, indent=2))

    def _markdown(self, table: SweepTable) -> str:
        lines = [table.to_markdown(), "", *(f"- best trial: {name}" for name in self.best)]
        lines += [f"- {name} failed: {' '.join(each.error.split())}" for name, each in self.failed.items()]
        return "\n".join([*lines, f"![Models by size and quality]({CHART_FILE})"])

    def _record(self, run: PlannedRun) -> dict[str, Any]:
        record: dict[str, Any] = {
            "run": run.name,
            "seed": run.seed,
            "folder": run.key,
            "settings": dict(run.settings),
            "status": "finished" if run.key in self.finished else "failed",
        }
        result = self.finished.get(run.key)
        if result is not None and result.comparison is not None:
            table = result.comparison
            names = [dense_name(table), *result.folders]
            record["models"] = {name: _numbers(table, name) for name in names}
        return record

    def __str__(self) -> str:
        lines: list[str] = []
        for name, preview in self.previews.items():
            lines += [f"=== {name} ===", str(preview)]
        if self.previews or not self.planned:
            search = self.config.search
            if search is not None:
                lines.append(f"search: {search.trials} trials over {', '.join(search.space)}")
            return "\n".join(lines)
        table, written = self.table(), [JSON_FILE]
        if table.rows:
            lines += [str(table), ""]
            written += [TABLE_FILE, CHART_FILE]
        lines += [f"best trial: {name}" for name in self.best]
        return "\n".join([*lines, f"wrote {', '.join(str(self.output / name) for name in written)}"])


def _numbers(table: Comparison, model: str) -> dict[str, Any]:
    """Return all that a comparison says of one model."""
    found: dict[str, Any] = {kind: size(kind)(table, model) for kind in SIZES if kind != "latency"}
    found["encoder_parameters"] = table.profiles[model].encoder_parameters
    for field_name in ("latency_ms", "speedup", "metrics"):
        rows: Mapping[str, Mapping[str, float]] = getattr(table, field_name)
        found[field_name] = {label: values[model] for label, values in rows.items() if model in values}
    return found
