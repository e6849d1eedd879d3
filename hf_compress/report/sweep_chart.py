"""The Pareto chart of a sweep, with published curves of the same data beside it."""

from hf_compress.config import Recipe, SweepConfig
from hf_compress.config.sweep import ENCODER_SPARSITY, SPARSITY
from hf_compress.errors import ConfigError
from hf_compress.report.pareto import ParetoChart, ParetoPoint, pareto_front
from hf_compress.report.references import reference_curves
from hf_compress.report.sweep_table import SweepRow, SweepTable, metric, size

FRACTIONS = (SPARSITY, ENCODER_SPARSITY)
LABELS = {
    SPARSITY: "sparsity: parameters removed of all",
    ENCODER_SPARSITY: "encoder sparsity: parameters removed of the stacks of layers",
    "parameters": "parameters",
    "flops": "operations of a forward pass",
    "latency": "latency in ms, {}",
}


def is_maximized(config: SweepConfig, name: str) -> bool:
    """Return whether more of a metric is better."""
    if config.direction is not None:
        return config.direction == "maximize"
    return not name.startswith("perplexity")


def sweep_chart(table: SweepTable, config: SweepConfig, recipe: Recipe) -> ParetoChart:
    """Return the chart of a sweep's models.

    Args:
        table: Its finished runs, at least one.
        config: Says what the axes are.
        recipe: Of any run; its data may have published curves.

    Raises:
        ConfigError: If the models lack what an axis is to show.
    """
    name = table.find_metric(config.metric)
    found = [_point(row, config, name) for row in table.rows]
    dense = table.dense().statistic(metric(name))
    curves, notes = {}, []
    for curve in reference_curves(recipe, name):
        points = curve.against(config.x)
        if points is None:
            notes.append(f"not shown: {curve.label}, whose source gives no {config.x}")
        else:
            curves[curve.label] = points
            notes.append(f"{curve.label}: {curve.note}; {curve.url}")
    return ParetoChart(
        points=found,
        x_label=LABELS[config.x].format(next(iter(next(iter(table.dense().seeds.values())).latency_ms), "")),
        y_label=name,
        more_x=config.x in FRACTIONS,
        more_y=is_maximized(config, name),
        dense=None if dense is None else dense.mean,
        curves=curves,
        notes=notes,
        in_percent=config.x in FRACTIONS,
    )


def front_labels(chart: ParetoChart) -> list[str]:
    """Return the names of the models that no other one beats."""
    pairs = [(point.x, point.y) for point in chart.points]
    return [chart.points[place].label for place in pareto_front(pairs, more_x=chart.more_x, more_y=chart.more_y)]


def _point(row: SweepRow, config: SweepConfig, name: str) -> ParetoPoint:
    x, y = row.statistic(size(config.x)), row.statistic(metric(name))
    for setting, value, found in (("x", config.x, x), ("metric", name, y)):
        if found is None:
            raise ConfigError(f"SweepConfig.{setting}: {row.label} has no {value!r}; choose another {setting}.")
    assert x is not None and y is not None
    return ParetoPoint(
        label=row.label,
        x=x.mean,
        y=y.mean,
        x_spread=x.spread,
        y_spread=y.spread,
        is_baseline=row.run in config.baselines,
    )
