"""The picture of the comparison with other libraries."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers_list import DENSE, OURS
from peers_report import good, label

COLORS = ("#8a939b", "#b5523b", "#5b8c3a", "#7a5aa6", "#c08a1e", "#24292f")


def plot(data: dict[str, Any], path: Path) -> bool:
    """Draw accuracy against encoder sparsity, a line a way of pruning; ours are thick.

    Args:
        data: What the benchmark stores.
        path: The picture.

    Returns:
        Whether there was anything to draw.
    """
    runs = good(data, "prune")
    if not runs:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    others = iter(COLORS * 2)
    for peer, variant in dict.fromkeys((run["peer"], run["variant"]) for run in runs):
        mine = [run for run in runs if (run["peer"], run["variant"]) == (peer, variant)]
        points = []
        for sparsity in sorted({run["sparsity"] for run in mine}):
            same = [run for run in mine if run["sparsity"] == sparsity]
            left = mean(run["encoder_parameters"] / run["dense_encoder_parameters"] for run in same)
            points.append((100 * (1 - left), 100 * mean(run["after"] for run in same)))
        color = "#1f6f8b" if peer == OURS else next(others)
        dashes = {"default": "-", "taylor": "--", "even": "-.", "l2": ":"}.get(variant, "-") if peer == OURS else "-"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle=dashes, color=color,
                  linewidth=2 if peer == OURS else 1.2, label=label(mine[0]))  # fmt: skip
    for run in good(data, "plain"):
        if run["variant"] == DENSE:
            axes.axhline(100 * run["before"], color="#24292f", linewidth=0.8, linestyle=":")
            axes.annotate("dense", (axes.get_xlim()[0], 100 * run["before"]), fontsize=7, va="bottom")
    axes.set_xlabel("encoder sparsity (%)")
    axes.set_ylabel("accuracy after recovery (%)")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    return True
