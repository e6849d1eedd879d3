"""Settings that a sweep searches for instead of being told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_compress.config.base import Config, Settings
from hf_compress.errors import ConfigError

TYPES = ("float", "int", "categorical")


@dataclass(frozen=True, kw_only=True)
class ParameterSpace(Settings):
    """The values that one setting may have."""

    type: str
    """``"float"``, ``"int"`` or ``"categorical"``."""

    low: float | int | None = None
    """The least number."""

    high: float | int | None = None
    """The largest number."""

    log: bool = False
    """Whether numbers are spread evenly over orders of magnitude, as suits learning rates."""

    choices: tuple[Any, ...] | None = None
    """For ``"categorical"``: texts, numbers, true, false or null."""

    def _validate(self) -> None:
        self._check_choice("type", TYPES)
        self._check_bool("log")
        if self.type == "categorical":
            self._check_choices()
        else:
            self._check_range()

    def _check_choices(self) -> None:
        for name, unset in {"low": None, "high": None, "log": False}.items():
            if getattr(self, name) != unset:
                raise self._error(name, getattr(self, name), "nothing for type 'categorical'", "Give choices.")
        given = self.choices
        plain = isinstance(given, list | tuple) and all(
            each is None or isinstance(each, str | int | float) for each in given
        )
        if not plain or len(set(map(repr, given or ()))) != len(given or ()) or not given:
            raise self._error("choices", given, "a list of different texts, numbers, true, false or null")
        object.__setattr__(self, "choices", tuple(given))

    def _check_range(self) -> None:
        if self.choices is not None:
            raise self._error("choices", self.choices, f"nothing for type {self.type!r}", "Give low and high.")
        kinds: Any = int if self.type == "int" else int | float
        for name in ("low", "high"):
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
                raise self._error(name, value, "an int" if self.type == "int" else "a number")
        assert self.low is not None and self.high is not None
        if self.low >= self.high:
            raise self._error("high", self.high, f"more than low={self.low!r}")
        if self.log and self.low <= 0:
            raise self._error("low", self.low, "more than 0 with log")

    def ends(self) -> tuple[Any, ...]:
        """Return the values by which to tell whether all are allowed: the outermost numbers, or every choice."""
        return (self.low, self.high) if self.choices is None else self.choices


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """A search by optuna: trials are runs whose settings follow from how good the earlier ones were."""

    trials: int
    """How many."""

    space: Mapping[str, ParameterSpace]
    """Setting -> its values."""

    against_x: bool = False
    """Whether trials are judged by the sweep's ``x`` as well, which gives Pareto trials instead of one best; ``False``:
    by the metric alone."""

    sampler_seed: int = 0
    """Makes the choice of settings repeatable."""

    def _validate(self) -> None:
        self._check_count("trials")
        self._check_bool("against_x")
        if not isinstance(self.sampler_seed, int) or isinstance(self.sampler_seed, bool) or self.sampler_seed < 0:
            raise self._error("sampler_seed", self.sampler_seed, "an int >= 0")
        if not isinstance(self.space, Mapping) or not self.space:
            raise self._error("space", self.space, "a mapping of settings to their values, with at least one")
        found = {}
        for name, space in self.space.items():
            try:
                found[name] = space if isinstance(space, ParameterSpace) else ParameterSpace.from_dict(space)
            except ConfigError as error:
                raise ConfigError(f"SearchConfig.space, {name}: {error}") from error
        object.__setattr__(self, "space", found)
