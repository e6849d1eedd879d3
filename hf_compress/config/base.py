"""Shared by every config: frozen, validated on construction, stored as JSON or YAML."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hf_compress.errors import ConfigError, choices, shown
from hf_compress.reading import dump_yaml, parse_json, parse_yaml, read_text
from hf_compress.schedule import gap, parse_epochs

SCHEMA_VERSION = 1

MOMENTS = "an int >= 0 (optimizer steps), a float in [0, 1] (fraction of the run) or a text such as '1.5 epochs'"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A set of checked fields, such as a part of a config."""

    def __post_init__(self) -> None:
        self._validate()

    def _validate(self) -> None:
        """Check every field; overridden by each config."""

    def _error(self, name: str, given: object, allowed: str, remedy: str = "") -> ConfigError:
        text = f"{type(self).__name__}.{name}: got {shown(given)}; allowed: {allowed}."
        return ConfigError(f"{text} {remedy}".rstrip())

    def _check_number(
        self, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
    ) -> None:
        value = getattr(self, name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not low <= value <= high or (open_low and value == low) or (open_high and value == high):
            interval = f"a number in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
            raise self._error(name, value, interval)

    def _check_choice(self, name: str, allowed: Any) -> None:
        value = getattr(self, name)
        if value not in tuple(allowed):
            raise ConfigError(f"{type(self).__name__}.{name}: unknown value {shown(value)}; {choices(value, allowed)}.")

    def _check_bool(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise self._error(name, value, "True or False")

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or not value:
            raise self._error(name, value, "a text that is not empty")

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(name, value, "an int >= 1")

    def _check_moment(self, name: str) -> None:
        """A moment is an int (optimizer steps), a float (fraction of the run) or a text (epochs)."""
        if not is_moment(getattr(self, name)):
            raise self._error(name, getattr(self, name), MOMENTS)

    def _check_order(self, begin: str, end: str) -> None:
        """Check that a moment is not before another; of unlike ones only the run can tell."""
        if (gap(getattr(self, begin), getattr(self, end)) or 0) < 0:
            raise self._error(end, getattr(self, end), f"nothing earlier than {begin}={getattr(self, begin)!r}")

    def _check_patterns(self, name: str) -> None:
        """Patterns are a list of regular expressions; a lone string would be taken apart into characters."""
        value = getattr(self, name)
        is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
        if not is_list or not all(isinstance(pattern, str) for pattern in value):
            raise self._error(name, value, "a tuple or list of regular expressions")
        for pattern in value:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise self._error(name, pattern, "regular expressions", f"This one is none: {error}.") from error
        object.__setattr__(self, name, tuple(value))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build a config from ``to_dict()`` output.

        Raises:
            ConfigError: If ``data`` is no mapping, for an unknown key, one that is missing, or a value that the config
                does not allow.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__}: got {shown(data)}; allowed: a mapping of its fields.")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise ConfigError(f"{cls.__name__}: unknown key {shown(key)}; {choices(key, known)}.")
        missing = [name for name in _needed(cls) if name not in data]
        if missing:
            raise ConfigError(
                f"{cls.__name__}: got only {shown(list(data))}; missing: {', '.join(map(repr, missing))}. Add them."
            )
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Shared by every config: strict keys, JSON and YAML both ways."""

    schema_version: int = SCHEMA_VERSION
    """Version of the stored form; a file written by a newer version is refused."""

    def __post_init__(self) -> None:
        if type(self.schema_version) is not int or self.schema_version != SCHEMA_VERSION:
            raise self._error("schema_version", self.schema_version, f"{SCHEMA_VERSION}", "Upgrade hf-compress.")
        super().__post_init__()

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """Return the config as YAML text."""
        return dump_yaml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the config to a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            ConfigError: If the path is none, or of another kind of file.
        """
        path = _path(path, type(self).__name__)
        path.write_text(self.to_json() if _suffix(path) == "json" else self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a config from a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            ConfigError: If the path is none, or if the file cannot be parsed or holds anything but a valid config.
        """
        path = _path(path, cls.__name__)
        data = read_file(path, cls.__name__)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def is_moment(value: object) -> bool:
    """Return whether a value is a moment of a run, see ``MOMENTS``."""
    if isinstance(value, str):
        try:
            parse_epochs(value)
        except ConfigError:
            return False
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 and not (isinstance(value, float) and value > 1)


def read_file(path: Path, kind: str) -> dict[str, Any]:
    """Return the mapping in a ``.json``, ``.yaml`` or ``.yml`` file.

    Args:
        path: The file.
        kind: Name of the config that it should hold, for messages.

    Raises:
        ConfigError: If it cannot be parsed, or holds no mapping.
    """
    suffix = _suffix(path)
    try:
        text = read_text(path)
        data = parse_json(text) if suffix == "json" else parse_yaml(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file; give the path of a {kind} file.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as {suffix}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of {kind} fields, got {type(data).__name__}.")
    return data


def _needed(kind: type[Settings]) -> list[str]:
    """Return the names of the fields that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]


def _path(given: str | Path, kind: str) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"{kind}: got {given!r} as a path; allowed: that of a .json, .yaml or .yml file.")
    return Path(given)


def _suffix(path: Path) -> str:
    kinds = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}
    if path.suffix not in kinds:
        raise ConfigError(f"{path}: unknown file type {path.suffix!r}; allowed: .json, .yaml, .yml.")
    return kinds[path.suffix]


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
