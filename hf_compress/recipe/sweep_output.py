"""The output folder of a sweep: whose it is, and what a sweep would replace there."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_compress.config import SweepConfig
from hf_compress.config.sweep import TRIAL
from hf_compress.errors import ConfigError
from hf_compress.reading import read_json, write_new
from hf_compress.recipe.output import has_begun, refuse_taken
from hf_compress.recipe.result import RECIPE_FILE
from hf_compress.recipe.sweep_plan import PlannedRun, with_recipe
from hf_compress.recipe.sweep_result import CHART_FILE, JSON_FILE, TABLE_FILE
from hf_compress.recipe.trials import TRIALS_FILE

SWEEP_FILE = "sweep.yaml"

BEGUN_FILE = "hf_compress_sweep.json"
"""Written by every sweep when it begins: its settings, and whether ``sweep.yaml`` is the user's own."""


def sweep_folder(config: SweepConfig) -> Path:
    """Return a sweep's output folder, which need not exist.

    Raises:
        ConfigError: If it has none, or if that is a file.
    """
    if config.output is None:
        raise ConfigError("SweepConfig.output: missing; set output, or give --output.")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"SweepConfig.output: {output} is a file; give the name of a new folder.")
    return output


def check_sweep_output(config: SweepConfig, planned: Sequence[PlannedRun], resume: bool) -> None:
    """Check that a sweep may write to its output folder; nothing is written.

    With ``resume``, runs may have been added or taken away: each one's own folder tells which recipe it is of.
    ``sweep.yaml`` may lie there before the sweep begins if it says the same.

    Args:
        config: The sweep, see ``with_recipe``.
        planned: Its runs.
        resume: Whether it may go on.

    Raises:
        ConfigError: If there are files that are not from a sweep, or that a new one would overwrite, or if it has
            searched in another way.
    """
    output = sweep_folder(config)
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / SWEEP_FILE).is_file() and not (output / BEGUN_FILE).is_file():
        raise ConfigError(
            f"SweepConfig.output: {output} holds files, but not from a sweep (no {SWEEP_FILE}), so nothing is written "
            "there. Choose another output."
        )
    if not _has_begun(config, planned, output):
        written = [JSON_FILE, TABLE_FILE, CHART_FILE, TRIALS_FILE]
        written += [name for each in written for name in (f"{each}.partial", f"partial-{each}")]
        refuse_taken("SweepConfig.output", output, written, "sweep")
        _check_same(config, output)
    elif not resume:
        raise ConfigError(
            f"SweepConfig.output: {output} holds a sweep already. Go on with it with --resume (resume=True), or choose "
            "another output."
        )
    else:
        stored, is_own = _stored(output)
        if is_own and (output / SWEEP_FILE).is_file():
            _check_same(config, output)
        _check_search(stored, config, output)


def make_sweep_output(config: SweepConfig, planned: Sequence[PlannedRun], output: Path) -> None:
    """Make the output folder of a sweep that begins or goes on, with its settings; a user's own file stays as it is.

    Args:
        config: The sweep, see ``with_recipe`` and ``check_sweep_output``.
        planned: Its runs.
        output: Its output folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, begun = output / SWEEP_FILE, output / BEGUN_FILE
    is_own = path.is_file() and (not _has_begun(config, planned, output) or _stored(output)[1])
    write_new(begun, json.dumps({"sweep": config.to_dict(), "own_file": is_own}, indent=2))
    if not is_own:
        partial = output / f"partial-{SWEEP_FILE}"
        config.save(partial)
        os.replace(partial, path)


def _has_begun(config: SweepConfig, planned: Sequence[PlannedRun], output: Path) -> bool:
    """Return whether a sweep has written to a folder; older versions left no mark, but their results, or runs."""
    if (output / BEGUN_FILE).is_file() or any(has_begun(run.recipe, run.folder) for run in planned):
        return True
    if config.search is not None and any(output.glob(f"{TRIAL.format('*')}-seed*/{RECIPE_FILE}")):
        return True
    try:
        return {"x", "runs", "failed"} <= set(read_json(output / JSON_FILE))
    except (OSError, ValueError, TypeError):
        return False


def _stored(output: Path) -> tuple[SweepConfig, bool]:
    """Return the sweep as it went on last, and whether ``sweep.yaml`` is the user's own."""
    path = output / BEGUN_FILE
    if not path.is_file():
        return SweepConfig.load(output / SWEEP_FILE), False
    try:
        data: Any = read_json(path)
        return SweepConfig.from_dict(data["sweep"]), bool(data["own_file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error!r}). Restore it, or choose another output to begin again."
        ) from error


def _says_the_same(config: SweepConfig, path: Path) -> bool:
    """Return whether a file is of the same sweep; where the output lies does not count."""
    return replace(with_recipe(SweepConfig.load(path)), output=None) == replace(config, output=None)


def _check_same(config: SweepConfig, output: Path) -> None:
    if not _says_the_same(config, output / SWEEP_FILE):
        raise ConfigError(
            f"SweepConfig.output: {output / SWEEP_FILE} is of another sweep, and no sweep has written it, so it is not "
            "replaced. Choose another output, or change that file and run it."
        )


def _check_search(stored: SweepConfig, given: SweepConfig, output: Path) -> None:
    """Earlier trials decide on later ones, so that all have to be of one search; it may become longer."""
    if stored.search is None or given.search is None:
        return
    old, new = stored.search, given.search
    same = replace(old, trials=new.trials) == new and new.trials >= old.trials
    judged_by = ("recipe", "seeds", "metric", "direction", *(["x"] if new.against_x else []))
    if not same or any(getattr(stored, name) != getattr(given, name) for name in judged_by):
        raise ConfigError(
            f"SweepConfig.search: {output} holds trials of another search; only trials may change, to a larger number. "
            "Choose another output."
        )
