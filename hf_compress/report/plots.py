"""Pictures for model cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_compress.errors import ConfigError

KEPT_COLOR = "#1f6f8b"
REMOVED_COLOR = "#e3e7ea"
TEXT_COLOR = "#24292f"
BIT_COLORS = ("#9ecae1", "#1f6f8b", "#d1495b", "#edae49")
MAX_LABELED_BARS = 32
INCHES_PER_BAR = 0.34
MIN_WIDTH, MAX_WIDTH = 6.0, 18.0
PANEL_HEIGHT = 2.3
TITLES = {"heads": "attention heads", "ffn": "feed-forward units"}


@dataclass(frozen=True, kw_only=True)
class KeptUnits:
    """How many units of one dimension group stayed."""

    name: str
    """Name of the group."""

    kept: int
    """Units that stayed."""

    total: int
    """Units before."""


def plot_kept_units(kept: Mapping[str, Sequence[KeptUnits]], path: str | Path) -> Path:
    """Draw what every layer kept: one panel a kind, one bar a layer.

    Args:
        kept: Kind of dimension group -> its groups in the model's order.
        path: File to write; the suffix chooses the format (``.png``, ``.svg``).

    Returns:
        The path.

    Raises:
        ConfigError: If there is nothing to draw.
    """
    panels = {kind: units for kind, units in kept.items() if units}
    if not panels:
        raise ConfigError("plot_kept_units: nothing to draw; give at least one kind with at least one group.")
    most = max(len(units) for units in panels.values())
    width = min(MAX_WIDTH, max(MIN_WIDTH, most * INCHES_PER_BAR + 1.5))
    figure = Figure(figsize=(width, PANEL_HEIGHT * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (kind, units) in enumerate(panels.items()):
        _draw_panel(figure.add_subplot(len(panels), 1, position + 1), kind, units)
    return save_figure(figure, path)


def plot_sensitivity(increases: Mapping[str, Mapping[int, float]], path: str | Path) -> Path:
    """Draw by how much the loss rises when one layer is quantized: a group of bars for each layer.

    Args:
        increases: By layer and number of bits; the same bits for all layers.
        path: File to write; the suffix chooses the format (``.png``, ``.svg``).

    Returns:
        The path.

    Raises:
        ConfigError: If there is nothing to draw.
    """
    if not increases:
        raise ConfigError("plot_sensitivity: nothing to draw; give at least one layer.")
    bits = list(next(iter(increases.values())))
    height = min(MAX_WIDTH, max(MIN_WIDTH / 2, len(increases) * INCHES_PER_BAR * 0.8 + 1.2))
    figure = Figure(figsize=(MIN_WIDTH + 2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thickness = 0.8 / len(bits)
    for number, each in enumerate(bits):
        places = [layer + (number - (len(bits) - 1) / 2) * thickness for layer in range(len(increases))]
        values = [found[each] for found in increases.values()]
        axes.barh(places, values, thickness, color=BIT_COLORS[number % len(BIT_COLORS)], label=f"{each} bits")
    axes.set_yticks(range(len(increases)), list(increases), fontsize=7 if len(increases) <= MAX_LABELED_BARS else 4)
    axes.invert_yaxis()
    axes.set_xlabel("increase of the loss when this layer alone is quantized", fontsize=9, color=TEXT_COLOR)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the same data give the same bytes.

    Args:
        figure: What was drawn.
        path: File to write; the suffix chooses the format.

    Returns:
        The path.
    """
    path = Path(path)
    # Metadata would differ from run to run.
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return path


def _draw_panel(axes: Axes, kind: str, units: Sequence[KeptUnits]) -> None:
    positions = range(len(units))
    axes.bar(positions, [u.total for u in units], color=REMOVED_COLOR, width=0.8, label="removed")
    axes.bar(positions, [u.kept for u in units], color=KEPT_COLOR, width=0.8, label="kept")
    total, kept = sum(u.total for u in units), sum(u.kept for u in units)
    title = TITLES.get(kind, kind)
    axes.set_title(
        f"{title}: {kept:,} of {total:,} kept ({kept / total:.0%})", color=TEXT_COLOR, fontsize=10, loc="left"
    )
    axes.margins(x=0.01)
    axes.set_ylim(0, 1.28 * max(u.total for u in units))
    if len(units) <= MAX_LABELED_BARS:
        for position, unit in enumerate(units):
            axes.annotate(
                str(unit.kept),
                (position, unit.kept),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=TEXT_COLOR,
            )
    step = max(1, -(-len(units) // MAX_LABELED_BARS))
    axes.set_xticks(list(positions)[::step], [str(i) for i in positions][::step], fontsize=8)
    axes.set_xlabel("layer", fontsize=9, color=TEXT_COLOR)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
