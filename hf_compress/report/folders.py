"""What a compression run, or a single compressed model, left in a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_compress.config import Recipe
from hf_compress.errors import ConfigError
from hf_compress.reading import are_texts, inside, read_json
from hf_compress.report.compare import Comparison, comparison_of_runs
from hf_compress.report.logs import StageLog, read_history
from hf_compress.report.results import Results

RESULT_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
LAST = "compressed"
"""What the last stage of a run is called."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One run, or one model; what is not there is None or empty."""

    path: Path

    recipe: Recipe | None
    """What was to be done."""

    comparison: Comparison | None
    """None if the run is not finished."""

    results: Mapping[str, Results]
    """Name of a model in ``comparison`` -> what its own folder says about it."""

    history: Sequence[StageLog]
    """What the Trainer logged in each stage, those without a log left out."""

    notes: Sequence[str]
    """Facts about model and data."""

    @property
    def main(self) -> str | None:
        """The model that the run is about: its last stage's, or the only one."""
        if self.comparison is None:
            return None
        _, *others = self.comparison.profiles
        known = self.results or others
        return LAST if LAST in known and LAST in others else next((name for name in known if name in others), None)


def is_run(directory: Path) -> bool:
    """Return whether a run, finished or not, or a single model with its results lies in a folder."""
    return any((directory / name).is_file() for name in (RESULT_FILE, RECIPE_FILE, Results.FILE_NAME))


def runs_below(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders inside a folder that hold finished runs, and those with a recipe alone."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    finished = [path for path in folders if (path / RESULT_FILE).is_file()]
    return finished, [path for path in folders if path not in finished and (path / RECIPE_FILE).is_file()]


def read_run(directory: Path) -> RunFolder:
    """Read all that there is.

    Args:
        directory: A folder for which ``is_run`` is true.

    Raises:
        ConfigError: If a file is damaged.
    """
    if (directory / Results.FILE_NAME).is_file() and not (directory / RESULT_FILE).is_file():
        return _single_model(directory)  # a recipe lies beside the models of runs, too
    stored = directory / RECIPE_FILE
    recipe = Recipe.load(stored) if stored.is_file() else None
    comparison, folders, notes = _finished(directory)
    found = {name: folder / Results.FILE_NAME for name, folder in folders.items()}
    return RunFolder(
        path=directory,
        recipe=recipe,
        comparison=comparison,
        results={name: _results(path) for name, path in found.items() if path.is_file()},
        history=_history(directory, recipe),
        notes=notes,
    )


def stage_folders(recipe: Recipe) -> dict[str, str]:
    """Return the names of a recipe's stages, and of the folders of their checkpoints inside the run's."""
    number = len(recipe.runs())
    names = [*(f"stage-{position}" for position in range(1, number)), LAST]
    inside = [f"/stage-{position}" if recipe.stages is not None else "" for position in range(1, number + 1)]
    return {name: f"{CHECKPOINTS}{each}" for name, each in zip(names, inside, strict=True)}


def _finished(directory: Path) -> tuple[Comparison | None, dict[str, Path], tuple[str, ...]]:
    """Comparison, folders and notes of a finished run."""
    path = directory / RESULT_FILE
    if not path.is_file():
        return None, {}, ()
    try:
        data = read_json(path)
        folders = {name: inside(directory, folder) for name, folder in data["folders"].items()}
        comparison, notes = comparison_of_runs(data["comparison"]), tuple(data["notes"])
        if not are_texts(data["notes"]) or not isinstance(data["metrics"], Mapping):
            raise TypeError("notes are no list of texts, or metrics no mapping")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return comparison, folders, notes


def _results(path: Path) -> Results:
    try:
        results = Results.load(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return results


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: is damaged ({type(error).__name__}: {error}); allowed: what a compression run writes there. Restore "
        "the file, or delete it and resume the run, which writes it again."
    )


def _history(directory: Path, recipe: Recipe | None) -> list[StageLog]:
    if recipe is None:
        return []
    stages = zip(stage_folders(recipe).items(), recipe.runs(), strict=True)
    found = (read_history(name, directory / name, directory / inside, run) for (name, inside), run in stages)
    return [log for log in found if log is not None]


def _single_model(directory: Path) -> RunFolder:
    results = _results(directory / Results.FILE_NAME)
    recipe = None if results.recipe is None else Recipe.from_dict(results.recipe)
    names = list(stage_folders(recipe)) if recipe is not None else []
    run: Any = recipe.runs()[names.index(results.model)] if recipe is not None and results.model in names else None
    log = read_history(results.model, directory, None, run)
    return RunFolder(
        path=directory,
        recipe=recipe,
        comparison=results.table(),
        results={results.model: results},
        history=[] if log is None else [log],
        notes=(),
    )
