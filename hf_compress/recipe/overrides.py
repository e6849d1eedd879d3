"""Settings that change a recipe: on the command line, and in the runs of a sweep."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_compress.config import Recipe
from hf_compress.config.base import read_file
from hf_compress.errors import ConfigError
from hf_compress.reading import parse_yaml


def load_recipe(path: str | Path, settings: Iterable[str] = (), output: str | None = None) -> Recipe:
    """Read a recipe and change settings in it.

    Args:
        path: A ``.json``, ``.yaml`` or ``.yml`` file.
        settings: Texts such as ``"training.learning_rate=3e-5"``: a setting, and its value in YAML.
        output: Replaces the recipe's output folder.

    Raises:
        ConfigError: If the file or a setting cannot be read, or the recipe that results is not valid.
    """
    data = plain_copy(read_file(Path(path), Recipe.__name__))
    names = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not all(name.split(".")):
            raise ConfigError(f"--set {setting!r}: allowed: NAME=VALUE, such as training.learning_rate=3e-5.")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: the value is no YAML: {' '.join(str(error).split())}") from error
        change_setting(data, name, value, f"--set {name}")
        names.append(name)
    if output is not None:
        data["output"] = output
    try:
        recipe = Recipe.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for name in names:
        check_effect(recipe, name, f"--set {name}")
    return recipe


def check_effect(recipe: Recipe, name: str, where: str) -> None:
    """Check that a training argument that was set for all stages is not replaced in each of them.

    Args:
        recipe: With the setting.
        name: Its name, such as ``"training.num_train_epochs"``.
        where: What asks for it, for messages.

    Raises:
        ConfigError: If no stage takes it.
    """
    section, _, argument = name.partition(".")
    if section != "training" or not argument or recipe.stages is None:
        return
    if not any(argument in (run.training or {}) for run in recipe.runs()) or all(
        argument in (stage.training or {}) for stage in recipe.stages
    ):
        raise ConfigError(
            f"{where}: has no effect, since every stage says otherwise. Set it in the stages: "
            f"stages.0.training.{argument}, and so on."
        )


def plain_copy(value: Any) -> Any:
    """Copy plain data so that no two parts of it are one object, as YAML's anchors make them."""
    if isinstance(value, dict):
        return {key: plain_copy(item) for key, item in value.items()}
    return [plain_copy(item) for item in value] if isinstance(value, list | tuple) else value


def change_setting(data: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Change one setting of a recipe's plain data.

    Args:
        data: A recipe as it is in a file.
        name: Such as ``"stages.1.pruning.structures.ffn"``; places in lists are counted from 0.
        value: The new value.
        where: What asks for it, for messages.

    Raises:
        ConfigError: If there is no such place.
    """
    *sections, last = name.split(".")
    inside: Any = data
    for depth, section in enumerate(sections):
        key = _key(inside, section, ".".join(sections[:depth]), where)
        if isinstance(inside, dict) and inside.get(key) is None:
            inside[key] = {}
        inside = inside[key]
        if not isinstance(inside, dict | list):
            raise ConfigError(f"{where}: {section!r} is {inside!r}, which has no settings in it.")
    inside[_key(inside, last, ".".join(sections), where)] = value


def _key(inside: Any, section: str, name: str, where: str) -> Any:
    """Return a part of a setting's name as the key of what it is looked up in."""
    if isinstance(inside, dict):
        return section
    places = "none, since it is empty" if not inside else f"0 to {len(inside) - 1}"
    if not section.isdecimal() or int(section) >= len(inside):
        raise ConfigError(
            f"{where}: {name!r} is a list, so got {section!r} as a place in it; allowed: {places}. Or give a new value "
            f"for all of {name!r}."
        )
    return int(section)
