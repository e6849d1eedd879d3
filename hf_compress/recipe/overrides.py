"""Settings on the command line that change a recipe file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hf_compress.config import Recipe
from hf_compress.config.base import parse_yaml, read_file
from hf_compress.errors import ConfigError


def load_recipe(path: str | Path, settings: Iterable[str] = (), output: str | None = None) -> Recipe:
    """Read a recipe and change settings in it.

    Args:
        path: A ``.json``, ``.yaml`` or ``.yml`` file.
        settings: Texts such as ``"training.learning_rate=3e-5"``: a setting, and its value in YAML.
        output: Replaces the recipe's output folder.

    Raises:
        ConfigError: If the file or a setting cannot be read, or the recipe that results is not valid.
    """
    data = read_file(Path(path), Recipe.__name__)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not all(name.split(".")):
            raise ConfigError(f"--set {setting!r}: allowed: NAME=VALUE, such as training.learning_rate=3e-5.")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value is no YAML: {' '.join(str(error).split())}") from error
        _change(data, name, value)
    if output is not None:
        data["output"] = output
    return Recipe.from_dict(data)


def _change(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    inside = data
    for section in sections:
        if inside.get(section) is None:
            inside[section] = {}
        inside = inside[section]
        if not isinstance(inside, dict):
            raise ConfigError(f"--set {name}: {section!r} is {inside!r}, which has no settings in it.")
    inside[last] = value
