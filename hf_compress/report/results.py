"""``results.json``: everything a model card says, as data that a run writes once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_compress.config import Config, Recipe
from hf_compress.graph.groups import DimensionGroup
from hf_compress.report.compare import Comparison
from hf_compress.report.plots import KeptUnits

RELATIONS = ("finetune", "quantized")
"""What a compressed model can be to its base model; the Hub also knows adapters and merges."""


@dataclass(frozen=True, kw_only=True)
class Results(Config):
    """What was done, on what, with which outcome; stored beside the model."""

    FILE_NAME: ClassVar[str] = "results.json"

    name: str
    """Name of the model, also the card's title."""

    model: str
    """Which model of ``comparison`` lies in this folder."""

    base_model: str
    """Hub name, or a description, of the pretrained model."""

    base_model_on_hub: bool = True
    """Whether ``base_model`` is a Hub name, so that the card may link it."""

    base_model_relation: str = "finetune"
    """What the model is to ``base_model``, in the Hub's spelling: ``"quantized"`` if its weights are integers."""

    auto_class: str
    """Class that loads the model, e.g. ``"AutoModelForSequenceClassification"``."""

    processor_class: str | None = None
    """Class that loads the tokenizer or image processor beside it, e.g. ``"AutoTokenizer"``, or None."""

    requires: str = "hf-compress"
    """Package, and perhaps its extra, that loading the model takes, e.g. ``"hf-compress[int8]"``."""

    task: str
    """Task in the Hub's spelling, e.g. ``"text-classification"``."""

    dataset: str
    """Name of the data that the model was trained and evaluated on."""

    dataset_id: str | None = None
    """Hub name of the data set, or None if it is not from the Hub."""

    evaluation_split: str = "test"
    """What the metrics were measured on."""

    num_evaluation_examples: int = 0
    """Examples in that split."""

    license: str | None = None
    """License of the weights in the Hub's spelling, or None if unknown."""

    license_name: str | None = None
    """Name of the license where ``license`` is ``"other"``, or None."""

    license_link: str | None = None
    """Where that license can be read, or None."""

    language: str | None = None
    """Language of the data, ISO 639-1, or None."""

    comparison: Mapping[str, Any]
    """``Comparison.to_dict()``."""

    kept: Mapping[str, Any]
    """Kind of dimension group -> list of ``{"name", "kept", "total"}``, layer by layer."""

    recipe: Mapping[str, Any] | None = None
    """``Recipe.to_dict()``, or None."""

    training: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the training run, shown as they are."""

    checks: tuple[str, ...] = ()
    """What the run verified, one sentence each."""

    def _validate(self) -> None:
        object.__setattr__(self, "checks", tuple(self.checks))
        self._check_choice("base_model_relation", RELATIONS)
        names = list(self.table().profiles)
        if self.model not in names:
            raise self._error("model", self.model, f"a model of the comparison: {names}")
        if self.recipe is not None:
            Recipe.from_dict(self.recipe)
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Files are edited by hand, too."""
        try:
            units = [unit for several in self.kept_units().values() for unit in several]
            right = all(isinstance(unit.name, str) and _are_counts(unit.kept, unit.total) for unit in units)
        except (TypeError, AttributeError):
            right = False
        if not right:
            raise self._error(
                "kept", self.kept, 'kind -> list of {"name", "kept", "total"}, the last two whole numbers'
            )
        metrics = self.table().metrics
        if not isinstance(metrics, Mapping) or not all(_are_scores(values) for values in metrics.values()):
            raise self._error("comparison.metrics", metrics, "metric -> model -> number")

    def table(self) -> Comparison:
        """Return the comparison as an object."""
        return Comparison.from_dict(self.comparison)

    def kept_units(self) -> dict[str, list[KeptUnits]]:
        """Return what every layer kept, by kind of dimension group."""
        return {kind: [KeptUnits(**unit) for unit in units] for kind, units in self.kept.items()}


def _are_counts(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _are_scores(values: object) -> bool:
    return isinstance(values, Mapping) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()
    )


def kept_units(groups: Iterable[DimensionGroup], masks: Mapping[str, Tensor]) -> dict[str, list[dict[str, Any]]]:
    """Count what masks keep, by kind of group and in the model's order.

    Args:
        groups: Dimension groups of the dense model.
        masks: Group name -> bool tensor [num_units], True = keep, as ``PruningCallback.masks()`` returns them.

    Returns:
        Kind -> list of ``{"name", "kept", "total"}``, as ``Results.kept`` wants it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        if group.name in masks:
            kept = int(masks[group.name].sum())
            unit = {"name": group.name, "kept": kept, "total": group.num_units}
            found.setdefault(group.kind, []).append(unit)
    return found
