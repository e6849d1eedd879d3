"""Published results to compare a sweep's own with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_compress.config import Recipe

METRIC = "metric"


@dataclass(frozen=True, kw_only=True)
class ReferenceCurve:
    """What others have published for one data set."""

    label: str
    """Name of the method."""

    source: str
    """Paper or file, and the table in it."""

    url: str

    note: str
    """What sets the numbers apart."""

    columns: tuple[str, ...]
    """Names of the numbers of a point: kinds of sizes as ``SweepConfig.x`` has them, and ``"metric"``."""

    points: tuple[tuple[float, ...], ...]
    """Fractions of parameters in percent."""

    def against(self, x: str) -> tuple[tuple[float, float], ...] | None:
        """Return (x, metric) of all points, sparsities as fractions, or None if the source says nothing of that x."""
        if x not in self.columns:
            return None
        place, metric = self.columns.index(x), self.columns.index(METRIC)
        return tuple((point[place] / 100, point[metric]) for point in self.points)


def reference_curves(recipe: Recipe, metric: str) -> Sequence[ReferenceCurve]:
    """Return what is published about a recipe's data set.

    Args:
        recipe: Says what the data are.
        metric: Row of a comparison, such as ``"accuracy (%)"``.
    """
    data = recipe.dataset
    if data is None:
        return ()
    entries: list[dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"),
    )
    for entry in entries:
        same = data.path in (entry["dataset"], entry["dataset"].rpartition("/")[2]) and data.name == entry["name"]
        if same and metric == entry["metric"]:
            return tuple(_curve(each) for each in entry["curves"])
    return ()


def _curve(data: dict[str, Any]) -> ReferenceCurve:
    points = tuple(tuple(map(float, point)) for point in data["points"])
    return ReferenceCurve(**{**data, "columns": tuple(data["columns"]), "points": points})
