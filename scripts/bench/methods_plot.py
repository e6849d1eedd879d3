"""The picture of the comparison of pruning methods."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HIGHLIGHTED = {"taylor": "#1f6f8b", "movement": "#b5523b", "grain": "#5b8c3a", "l2": "#24292f", "random": "#8a939b"}
OTHER = "#c9cfd4"


def plot(data: dict[str, Any], path: Path) -> Path:
    """Draw accuracy against encoder sparsity, a panel a task, a line a method.

    Args:
        data: What the benchmark stores.
        path: The picture.
    """
    tasks = list(dict.fromkeys(run["task"] for run in data["runs"]))
    figure = Figure(figsize=(7.5 * len(tasks), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for position, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), position + 1)
        runs = [run for run in data["runs"] if run["task"] == task]
        for name in sorted({run["method"] for run in runs}, key=lambda each: each in HIGHLIGHTED):
            mine = [run for run in runs if run["method"] == name]
            sparsities = sorted({run["sparsity"] for run in mine})
            values = [100 * mean(run["accuracy"] for run in mine if run["sparsity"] == s) for s in sparsities]
            known = name in HIGHLIGHTED
            style: dict[str, Any] = {"color": HIGHLIGHTED.get(name, OTHER), "linewidth": 2 if known else 1}
            axes.plot([100 * s for s in sparsities], values, "o-", markersize=4, **style)
            axes.annotate(name, (100 * sparsities[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                          va="center", fontsize=7, color=style["color"] if known else "#6b747c")  # fmt: skip
        axes.axhline(100 * data["dense"][task]["accuracy"], color="#24292f", linewidth=0.8, linestyle=":")
        axes.set_title(f"{task} (dotted: dense)", fontsize=10)
        axes.set_xlabel("encoder sparsity (%)")
        axes.set_ylabel("accuracy (%)")
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    return path
