"""The output folder of a run: whose it is, what a run would replace there, and what the run began with."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from hf_compress.callbacks.state import JSON_FILE as STATE_FILE
from hf_compress.config import Recipe
from hf_compress.errors import ConfigError
from hf_compress.reading import read_json, write_new
from hf_compress.recipe.result import CHECKPOINTS, RECIPE_FILE, RESULT_FILE, RunResult
from hf_compress.recipe.stages import FACTS_FILE, SMALL, stages_of

BEGUN_FILE = "hf_compress_run.json"
"""Written by every run when it begins: a recipe file alone may be the user's own."""

DataFacts = Mapping[str, Mapping[str, Any]]
"""Training and evaluation data -> what tells them from others, see ``data_facts``."""


def make_output(recipe: Recipe, output: Path, data: DataFacts | None) -> None:
    """Make the output folder of a run that begins or goes on: the recipe, and the mark that a run has begun.

    A recipe file that is there says the same, see ``check_output``, and stays as it is.

    Args:
        recipe: The recipe.
        output: Its output folder.
        data: What the run trains and is evaluated on, or None if that is not known yet; kept from the first time.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / RECIPE_FILE).is_file():
            recipe.save(output / RECIPE_FILE)
        if not (output / BEGUN_FILE).is_file() or stored_data(output) is None:
            write_new(output / BEGUN_FILE, json.dumps({"data": data}, indent=2))
    except OSError as error:
        raise ConfigError(
            f"Recipe.output: {output} cannot be written ({error}). Choose another output, or mend its permissions."
        ) from error


def check_output(recipe: Recipe, resume: bool) -> Path:
    """Check that a run may write to the recipe's output folder; nothing is written.

    The recipe file may lie there already. A run has begun there if ``hf_compress_run.json`` says so or, after older
    versions, if there is what only a run leaves.

    Raises:
        ConfigError: If there are files that are not from this recipe, or that a new run would overwrite.
    """
    output = Path(str(recipe.output))
    if output.exists() and not output.is_dir():
        raise ConfigError(f"Recipe.output: {output} is a file; give the name of a new folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return output
    stored = output / RECIPE_FILE
    if not stored.is_file():
        raise ConfigError(
            f"Recipe.output: {output} holds files, but not from a recipe (no {RECIPE_FILE}), so nothing is written "
            "there. Choose another output."
        )
    different = _differences(Recipe.load(stored).to_dict(), recipe.to_dict())
    if different:
        raise ConfigError(
            f"Recipe.output: {output} is from another recipe, which differs in {', '.join(different)}. Choose another "
            "output, or run the recipe that it is from."
        )
    if not has_begun(recipe, output):
        refuse_taken("Recipe.output", output, _written(recipe, output), "run of this recipe")
    elif not resume:
        raise ConfigError(
            f"Recipe.output: {output} holds a run of this recipe already. Go on with it with --resume (resume=True), "
            "or choose another output."
        )
    return output


def has_begun(recipe: Recipe, output: Path) -> bool:
    """Return whether a run of the recipe has written to its output folder."""
    if (output / BEGUN_FILE).is_file():
        return True
    stages = stages_of(recipe, output)
    if any((stage.folder / FACTS_FILE).is_file() for stage in stages):
        return True
    states = [STATE_FILE] if recipe.stages is None else [STATE_FILE, TRAINER_STATE_NAME]
    if any(any(stage.checkpoints.glob(f"checkpoint-*/{state}")) for stage in stages for state in states):
        return True
    try:
        return (output / RESULT_FILE).is_file() and bool(RunResult.load(output).folders)
    except ConfigError:
        return False


def refuse_taken(where: str, output: Path, names: Iterable[str], kind: str) -> None:
    """Check that nothing lies in a folder that would be replaced or deleted there.

    Empty folders of checkpoints and of half a result do not count.

    Args:
        where: The setting, for the message.
        output: The folder.
        names: Files and folders that will be written.
        kind: Who would have made them.

    Raises:
        ConfigError: If there is anything.
    """
    taken = [name for name in dict.fromkeys(names) if _is_in_the_way(output / name)]
    if taken:
        raise ConfigError(
            f"{where}: {output} holds {', '.join(taken)}, which no {kind} has made and a new one would replace or "
            "delete. Move them away, or choose another output."
        )


def check_data(output: Path, data: DataFacts) -> None:
    """Check that a run goes on with the data that it began with; one that older versions began goes on unchecked.

    Args:
        output: The run's output folder.
        data: What is there now.

    Raises:
        ConfigError: If they differ.
    """
    for which, now in data.items():
        then = (stored_data(output) or {}).get(which, now)
        if then != now:
            how = f"{then.get('examples'):,} examples then, {now['examples']:,} now"
            if then.get("examples") == now["examples"]:
                how = f"as many examples, {now['examples']:,}, but with other contents or in another order"
            raise ConfigError(
                f"Recipe.dataset: the {which} data are not those that the run in {output} began with: {how}. What was "
                "learned there and what is measured would not belong together. Bring the old data back to resume, or "
                "choose another output to begin again."
            )


def stored_data(output: Path) -> DataFacts | None:
    """Return what a run began with, or None if that is not known.

    Raises:
        ConfigError: If the file is damaged.
    """
    path = output / BEGUN_FILE
    if not path.is_file():
        return None
    try:
        data = read_json(path)["data"]
        if data is not None and not all(isinstance(facts["examples"], int) for facts in data.values()):
            raise TypeError("numbers of examples are no whole numbers")
        found: DataFacts | None = data
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error!r}). Restore it, or choose another output to begin again."
        ) from error


def _written(recipe: Recipe, output: Path) -> list[str]:
    """Return the names of what a run writes into its output folder, besides its recipe and its mark."""
    folders = [stage.folder.name for stage in stages_of(recipe, output)]
    exported = [] if recipe.export is None else [f"{SMALL}-{recipe.export}"]
    return [
        CHECKPOINTS,
        *(name for folder in folders for name in (folder, f"{folder}.partial")),
        *exported,
        RESULT_FILE,
    ]


def _is_in_the_way(path: Path) -> bool:
    is_partial = path.suffix == ".partial" and not path.is_symlink()
    if path.is_dir() and (is_partial or path.name == CHECKPOINTS):  # empty ones lose nothing
        return any(each.is_symlink() or not each.is_dir() for each in path.rglob("*"))
    return path.exists() or path.is_symlink()


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that differ; where the output lies is none of them."""
    found: list[str] = []
    for key in dict.fromkeys([*stored, *given]):
        old, new = stored.get(key), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key != "output":
            found.append(prefix + key)
    return found
