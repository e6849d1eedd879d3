"""Which of several models no other one beats, and a chart of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_compress.errors import ConfigError
from hf_compress.report.plots import TEXT_COLOR, save_figure
from hf_compress.report.tradeoff import front

POINT_COLOR = "#1f6f8b"
BASELINE_COLOR = "#d1495b"
DENSE_COLOR = "#57606a"
REFERENCE_COLORS = ("#8c6bb1", "#edae49", "#66a182", "#a0785a")
REFERENCE_MARKERS = ("^", "s", "D", "v")
MAX_LABELED_POINTS = 24


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """One model of a chart."""

    label: str
    x: float
    """Its size."""

    y: float
    """How good it is."""

    x_spread: float = 0.0
    """Standard deviation over seeds."""

    y_spread: float = 0.0
    """The same of ``y``."""

    is_baseline: bool = False
    """Whether it is there for comparison only."""


@dataclass(frozen=True, kw_only=True)
class ParetoChart:
    """What ``plot_pareto`` draws."""

    points: Sequence[ParetoPoint]
    x_label: str
    y_label: str

    more_x: bool
    """Whether a larger x is better, as of sparsities."""

    more_y: bool
    """Whether a larger y is better."""

    dense: float | None = None
    """y of the model before compression."""

    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Name of a published curve -> its points."""

    notes: Sequence[str] = ()
    """Lines below the chart."""

    in_percent: bool = False
    """Whether x is a fraction, to be shown in percent."""


def pareto_front(pairs: Sequence[tuple[float, float]], *, more_x: bool, more_y: bool) -> list[int]:
    """Return the places of the pairs that no other one beats: none is at least as good in both and better in one.

    Args:
        pairs: (x, y).
        more_x: Whether a larger x is better.
        more_y: Whether a larger y is better.

    Returns:
        Places in order of x; equal pairs are all there.
    """
    found = front([(-x if more_x else x, y if more_y else -y) for x, y in pairs])
    return sorted(found, key=lambda each: (pairs[each][0], each))


def plot_pareto(chart: ParetoChart, path: str | Path) -> Path:
    """Draw models by size and quality: the Pareto front as a line, baselines apart, the spread over seeds as bars.

    Args:
        chart: What to draw.
        path: File to write; the suffix chooses the format (``.png``, ``.svg``).

    Returns:
        The path.

    Raises:
        ConfigError: If there is nothing to draw.
    """
    if not chart.points:
        raise ConfigError("plot_pareto: nothing to draw; give at least one point.")
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_curves(axes, chart)
    scale = 100 if chart.in_percent else 1
    places = pareto_front([(p.x, p.y) for p in chart.points], more_x=chart.more_x, more_y=chart.more_y)
    chosen = [chart.points[place] for place in places]
    axes.plot([scale * p.x for p in chosen], [p.y for p in chosen], color=POINT_COLOR, linewidth=1.2, label="front")
    for is_baseline, color, marker, label in (
        (False, POINT_COLOR, "o", "runs"),
        (True, BASELINE_COLOR, "X", "baselines"),
    ):
        _draw_points(axes, [p for p in chart.points if p.is_baseline is is_baseline], scale, color, marker, label)
    if chart.dense is not None:
        axes.axhline(chart.dense, color=DENSE_COLOR, linestyle="--", linewidth=1, label=f"dense: {chart.dense:.2f}")
    axes.set_xlabel(f"{chart.x_label} (%)" if chart.in_percent else chart.x_label, fontsize=9, color=TEXT_COLOR)
    axes.set_ylabel(chart.y_label, fontsize=9, color=TEXT_COLOR)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    if chart.notes:
        figure.supxlabel("\n".join(chart.notes), fontsize=6, color=DENSE_COLOR)
    return save_figure(figure, path)


def _draw_curves(axes: Axes, chart: ParetoChart) -> None:
    scale = 100 if chart.in_percent else 1
    for number, (name, points) in enumerate(chart.curves.items()):
        ordered = sorted(points)
        axes.plot(
            [scale * x for x, _ in ordered],
            [y for _, y in ordered],
            color=REFERENCE_COLORS[number % len(REFERENCE_COLORS)],
            marker=REFERENCE_MARKERS[number % len(REFERENCE_MARKERS)],
            markersize=4,
            linewidth=0.9,
            linestyle=":",
            label=f"{name} (published)",
        )


def _draw_points(axes: Axes, points: Iterable[ParetoPoint], scale: float, color: str, marker: str, label: str) -> None:
    points = list(points)
    if not points:
        return
    axes.errorbar(
        [scale * p.x for p in points],
        [p.y for p in points],
        xerr=[scale * p.x_spread for p in points],
        yerr=[p.y_spread for p in points],
        fmt=marker,
        color=color,
        markersize=6,
        elinewidth=1,
        capsize=2,
        label=label,
    )
    for point in points if len(points) <= MAX_LABELED_POINTS else []:
        place = (scale * point.x, point.y)
        axes.annotate(point.label, place, xytext=(4, 4), textcoords="offset points", fontsize=7, color=TEXT_COLOR)
