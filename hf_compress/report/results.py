"""``results.json``: everything a model card says, as data that a run writes once."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_compress.config import Config, Recipe
from hf_compress.graph.groups import DimensionGroup
from hf_compress.reading import are_texts, is_count, is_line
from hf_compress.report.compare import Comparison, comparison_of_runs
from hf_compress.report.plots import KeptUnits

_PACKAGE = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?")

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
        for name in ("name", "model", "base_model", "task", "dataset", "evaluation_split"):
            self._check_line(name)
        for name in ("dataset_id", "license", "license_name", "license_link", "language"):
            if getattr(self, name) is not None:
                self._check_line(name)
        self._check_code()
        self._check_bool("base_model_on_hub")
        if not is_count(self.num_evaluation_examples):
            raise self._error("num_evaluation_examples", self.num_evaluation_examples, "an int >= 0")
        if not isinstance(self.training, Mapping):
            raise self._error("training", self.training, "a mapping of facts")
        if not are_texts(self.checks):
            raise self._error("checks", self.checks, "a list of sentences")
        object.__setattr__(self, "checks", tuple(self.checks))
        self._check_choice("base_model_relation", RELATIONS)
        names = list(comparison_of_runs(self.comparison).profiles)
        if self.model not in names:
            raise self._error("model", self.model, f"a model of the comparison: {names}")
        if self.recipe is not None:
            Recipe.from_dict(self.recipe)
        if not isinstance(self.kept, Mapping) or not all(map(_are_kept, self.kept.values())):
            raise self._error("kept", self.kept, 'kind -> list of {"name", "kept", "total"}')

    def _check_line(self, name: str) -> None:
        if not is_line(getattr(self, name)):
            raise self._error(name, getattr(self, name), "a text of one line")

    def _check_code(self) -> None:
        """Check what a card puts into code that readers copy."""
        if not isinstance(self.auto_class, str) or not self.auto_class.isidentifier():
            raise self._error("auto_class", self.auto_class, "the name of a class")
        if not isinstance(self.requires, str) or not _PACKAGE.fullmatch(self.requires):
            raise self._error("requires", self.requires, 'the name of a package, such as "hf-compress[int8]"')

    def table(self) -> Comparison:
        """Return the comparison as an object."""
        return Comparison.from_dict(self.comparison)

    def kept_units(self) -> dict[str, list[KeptUnits]]:
        """Return what every layer kept, by kind of dimension group."""
        return {kind: [KeptUnits(**unit) for unit in units] for kind, units in self.kept.items()}


def _are_kept(units: Any) -> bool:
    return isinstance(units, list | tuple) and all(
        isinstance(unit, Mapping)
        and set(unit) == {"name", "kept", "total"}
        and is_line(unit["name"])
        and is_count(unit["kept"])
        and is_count(unit["total"])
        and unit["kept"] <= unit["total"]
        and unit["total"] > 0
        for unit in units
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
