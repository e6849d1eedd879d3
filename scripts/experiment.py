"""``Experiment``: a published experiment's recipe, changed so that it runs on a stand-in and on a small machine."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_compress import ConfigError, Recipe
from hf_compress.config.base import read_file
from hf_compress.errors import choices
from hf_compress.recipe.overrides import change_setting, load_recipe, plain_copy

RECIPES = Path(__file__).resolve().parent / "recipes"
OFFLINE = RECIPES / "offline"
OURS, BASELINE = "ours", "l2"
METHODS = (OURS, BASELINE)
SPARSITIES = (0.5, 0.75, 0.9)
COMMON = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
"""Training arguments of all runs, which are short."""


@dataclass(frozen=True)
class Experiment:
    """What a file of ``scripts/recipes/offline`` says."""

    name: str
    """The file's name."""

    recipe: str
    """File of the recipe that it is made from."""

    stand_in: str
    """Module of ``stand_ins`` with ``data_folder`` and ``model_folder``."""

    title: str
    stands_for: str
    data: str
    model: str
    license: str
    metric: str
    """Row of the comparison that counts."""

    higher_is_better: bool
    settings: Mapping[str, Any]
    """Settings of the recipe, names with dots, that take the place of its own."""

    baseline: Mapping[str, Any]
    """Further settings for the baseline."""

    structures: tuple[str, ...] = ("heads", "ffn")
    """What is pruned, all by the same sparsity."""

    limits: Mapping[str, float] = field(default_factory=dict)
    """Structure -> highest sparsity, where every layer has to keep one of few units."""

    levels: Mapping[float, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """What to call a budget, as a sparsity -> method -> its further settings: for recipes with stages, each of which
    has a share of its own, in the place of one sparsity of all structures."""

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        """Read a file.

        Raises:
            ConfigError: If it cannot be read, or a field is missing or unknown.
        """
        data = read_file(path, cls.__name__)
        known = {each.name for each in fields(cls)} - {"name"}
        for key in data:
            if key not in known:
                raise ConfigError(f"{path}: {key!r} is unknown; {choices(key, known)}.")
        try:
            return cls(name=path.stem, **{**data, "structures": tuple(data.get("structures", cls.structures))})
        except TypeError as error:
            raise ConfigError(f"{path}: {error}.") from error

    def folders(self) -> tuple[Path, Path]:
        """Return the folders of the stand-in's data and dense model, made on first use.

        Raises:
            ConfigError: If a library that reads them is missing.
            DemoDataError: If they cannot be downloaded.
        """
        try:
            module = importlib.import_module(f"stand_ins.{self.stand_in}")
            return module.data_folder(), module.model_folder()
        except ImportError as error:
            raise ConfigError(
                f"{self.name}: {error}. Install the requirements: pip install -e '.[stand-ins]'"
            ) from error

    def recipe_of(
        self, method: str, sparsity: float, seed: int, scale: float, folders: tuple[Path, Path], output: Path
    ) -> Recipe:
        """Return the recipe of one run.

        Args:
            method: One of ``METHODS``.
            sparsity: The share of each structure's units that goes.
            seed: The run's.
            scale: Times the steps of the experiment.
            folders: Of the data and of the dense model.
            output: The run's folder.

        Raises:
            ConfigError: If the recipe is not valid.
        """
        settings = {
            **self.settings,
            **(self.baseline if method == BASELINE else {}),
            **self.budget_of(method, sparsity),
            "model": str(folders[1]),
            "dataset": {**self.settings["dataset"], "path": str(folders[0])},
            "training": {**self.settings["training"], **COMMON, "seed": seed},
        }
        lines = [f"{name}={json.dumps(_scaled(value, scale))}" for name, value in settings.items()]
        return load_recipe(RECIPES / self.recipe, lines, str(output))

    def budget_of(self, method: str, sparsity: float) -> dict[str, Any]:
        """Return the settings of a budget.

        Raises:
            ConfigError: If the experiment has no such level.
        """
        if not self.levels:
            return {
                "pruning.structures": {name: min(sparsity, self.limits.get(name, sparsity)) for name in self.structures}
            }
        if sparsity not in self.levels:
            raise ConfigError(f"{self.name}: got a sparsity of {sparsity}; {choices(sparsity, self.levels)}.")
        return dict(self.levels[sparsity].get(method, {}))

    def sparsities(self) -> tuple[float, ...]:
        """Return the budgets that are run unless others are asked for."""
        return tuple(self.levels) or SPARSITIES

    def effective(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return the published recipe as this experiment uses it: without what its settings replace.

        Args:
            recipe: The published recipe's fields.
        """
        data: dict[str, Any] = plain_copy(dict(recipe))
        for name, value in self.settings.items():
            change_setting(data, name, plain_copy(value), self.name)
        return {**data, "model": None, "dataset": None}

    def facts(self) -> dict[str, Any]:
        """Return what its file says, as results store it."""
        return {name: value for name, value in asdict(self).items() if name != "levels" or value}


def _scaled(value: Any, scale: float) -> Any:
    """Return a setting with the length of all training in it scaled."""
    if not isinstance(value, Mapping):
        return value
    lengths: dict[str, Callable[[float], float]] = {
        "max_steps": lambda steps: max(round(steps), 1),
        "num_train_epochs": float,
    }
    return {
        name: lengths[name](each * scale) if name in lengths else _scaled(each, scale) for name, each in value.items()
    }


def experiments() -> dict[str, Experiment]:
    """Return all experiments by name.

    Raises:
        ConfigError: If a file is not valid.
    """
    return {path.stem: Experiment.load(path) for path in sorted(OFFLINE.glob("*.yaml"))}
