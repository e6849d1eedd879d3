"""``SweepConfig``: one recipe with several settings, such as a series of sparsities."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hf_compress.config.base import Config
from hf_compress.config.search import SearchConfig
from hf_compress.errors import ConfigError

SPARSITY = "sparsity"
ENCODER_SPARSITY = "encoder sparsity"
SIZES = (SPARSITY, ENCODER_SPARSITY, "parameters", "flops", "latency")
"""What the chart can show on its x axis."""

DIRECTIONS = ("maximize", "minimize")
TRIAL = "trial-{}"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """Several runs of one recipe; each trains with some settings changed, and with each of the seeds."""

    recipe: str | Mapping[str, Any]
    """A recipe file, or a recipe's fields. In a file of a sweep, a relative path starts at that file. The recipe's own
    ``output`` is not used."""

    output: str | None = None
    """Folder for the runs, the table and the chart; new, or of this sweep."""

    runs: Mapping[str, Values] | None = None
    """Name of a run -> setting -> value, as in ``{"half": {"pruning.structures.ffn": 0.5}}``. Places in lists are
    counted from 0: ``stages.1.pruning.structures.ffn``. No settings at all is the recipe as it is."""

    grid: Mapping[str, tuple[Any, ...]] | None = None
    """Setting -> values; every combination is a run."""

    search: SearchConfig | None = None
    """Runs whose settings optuna chooses."""

    seeds: tuple[int, ...] | None = None
    """Each run is done with each of these in place of ``training.seed``, of the recipe and of stages that have one;
    ``None``: once, with the recipe's own."""

    x: str = SPARSITY
    """What the chart shows against the metric: ``"sparsity"`` (the fraction of all parameters that is gone),
    ``"encoder sparsity"`` (the same of the stacks of layers), ``"parameters"``, ``"flops"`` or ``"latency"``."""

    metric: str | None = None
    """Row of the runs' tables that tells how good a model is, such as ``"accuracy (%)"``; ``None``: the first."""

    direction: str | None = None
    """``"maximize"`` or ``"minimize"``; ``None``: perplexities are minimized, all else is maximized."""

    baselines: tuple[str, ...] = ()
    """Names of ``runs`` that the chart shows as what the others are compared with."""

    def _validate(self) -> None:
        if not isinstance(self.recipe, Mapping):
            self._check_text("recipe")
        if self.output is not None:
            self._check_text("output")
        if self.metric is not None:
            self._check_text("metric")
        if self.direction is not None:
            self._check_choice("direction", DIRECTIONS)
        self._check_choice("x", SIZES)
        self._check_seeds()
        self._check_runs()
        self._check_grid()
        if isinstance(self.search, Mapping):
            object.__setattr__(self, "search", SearchConfig.from_dict(self.search))
        elif self.search is not None and not isinstance(self.search, SearchConfig):
            raise self._error("search", self.search, "a SearchConfig, a mapping of its fields, or None")
        if self.search is not None:
            self._check_settings("search.space", self.search.space)
        if self.runs is None and self.grid is None and self.search is None:
            raise ConfigError("SweepConfig: nothing to run; give at least one of runs, grid and search.")
        self._check_names()

    def _check_seeds(self) -> None:
        given: Any = self.seeds
        if given is None:
            return
        ints = isinstance(given, list | tuple) and all(type(each) is int and each >= 0 for each in given)
        if not ints or not given or len(set(given)) != len(given):
            raise self._error("seeds", given, "a list of different ints >= 0, or None")
        object.__setattr__(self, "seeds", tuple(given))

    def _check_runs(self) -> None:
        if self.runs is None:
            return
        if not isinstance(self.runs, Mapping) or not self.runs:
            raise self._error("runs", self.runs, "a mapping of names to settings, with at least one, or None")
        found = {}
        for name, settings in self.runs.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise self._error("runs", name, "names of letters, digits and . _ + -, since they name folders")
            if settings is not None and not isinstance(settings, Mapping):
                raise self._error(f"runs[{name!r}]", settings, "a mapping of settings to values")
            found[name] = dict(settings or {})
            self._check_settings(f"runs[{name!r}]", found[name])
        object.__setattr__(self, "runs", found)

    def _check_grid(self) -> None:
        if self.grid is None:
            return
        if not isinstance(self.grid, Mapping) or not self.grid:
            raise self._error("grid", self.grid, "a mapping of settings to lists of values, with at least one, or None")
        self._check_settings("grid", self.grid)
        for name, values in self.grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise self._error(f"grid[{name!r}]", values, "a list of at least one value")
        object.__setattr__(self, "grid", {name: tuple(values) for name, values in self.grid.items()})

    def _check_settings(self, where: str, settings: Values) -> None:
        for name in settings:
            if not isinstance(name, str) or not all(name.split(".")):
                raise self._error(where, name, "settings such as training.learning_rate")
            if name == "output":
                raise self._error(where, name, "the recipe's settings", "Every run has a folder in the sweep's output.")
            if self.seeds is not None and f".{name}".endswith(".training.seed"):
                raise self._error(where, name, "no seed beside seeds", "Leave one of them out.")

    def _check_names(self) -> None:
        names = [name for name, _ in self.settings()]
        names += [TRIAL.format(number) for number in range(self.search.trials if self.search is not None else 0)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"SweepConfig: two runs are called {twice[0]!r}. Write them out in runs, under names of their own."
            )
        given: Any = self.baselines
        if not isinstance(given, list | tuple) or not set(given) <= set(self.runs or {}):
            raise self._error("baselines", given, f"a list of names of runs: {list(self.runs or {})}")
        object.__setattr__(self, "baselines", tuple(given))

    def settings(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name of every run that is known beforehand, and what it changes in the recipe."""
        for name, settings in (self.runs or {}).items():
            yield name, dict(settings)
        if self.grid is not None:
            for values in itertools.product(*self.grid.values()):
                chosen = dict(zip(self.grid, values, strict=True))
                yield "_".join(_slug(name, value) for name, value in chosen.items()), chosen

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a sweep from a ``.json``, ``.yaml`` or ``.yml`` file; the path of its recipe starts there.

        Raises:
            ConfigError: If the path is none, or if the file cannot be parsed or holds anything but a valid sweep.
        """
        found = super().load(path)
        if isinstance(found.recipe, str):
            return dataclasses.replace(found, recipe=str(Path(path).parent / found.recipe))
        return found


def _slug(setting: str, value: Any) -> str:
    """Return a part of a folder's name that tells a setting and its value."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{setting.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+]+', '-', text).strip('-')}"
