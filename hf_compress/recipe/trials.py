"""Runs whose settings optuna chooses."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_compress.config import ParameterSpace, SearchConfig
from hf_compress.errors import ConfigError
from hf_compress.reading import read_json, write_new

TRIALS_FILE = "trials.json"

Judge = Callable[[int, Mapping[str, Any]], Sequence[float] | None]
"""(number of a trial, its settings) -> its values, of which more is better, or None if it failed."""


def check_optuna() -> None:
    """Check that optuna is there.

    Raises:
        ConfigError: If not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "SweepConfig.search: needs optuna, which is not installed. Install it: pip install 'hf-compress[search]'."
        ) from error


def run_trials(search: SearchConfig, num_values: int, output: Path, judge: Judge) -> list[int]:
    """Run all trials, one after the other.

    Settings are written to ``trials.json`` before their trial runs. Called again with the same folder, trials have the
    settings that they had, and the later ones those that they would have had: each is sampled with a seed of its own.

    Args:
        search: How many, and of what.
        num_values: How many values a trial has.
        output: Folder for ``trials.json``.
        judge: Runs a trial.

    Returns:
        Numbers of the best trial, or of those that no other beats in all values.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(directions=["maximize"] * num_values)
        known = _read(output / TRIALS_FILE)
        for number in range(search.trials):
            study.sampler = optuna.samplers.TPESampler(seed=(search.sampler_seed * 1_000_003 + number) % 2**32)
            if number < len(known):
                study.enqueue_trial(known[number])
            trial = study.ask()
            settings = {name: _suggest(trial, name, space) for name, space in search.space.items()}
            if number >= len(known):
                known.append(settings)
                write_new(output / TRIALS_FILE, json.dumps(known, indent=2))
            values = judge(number, settings)
            if values is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, list(values))
        return [trial.number for trial in study.best_trials]
    finally:
        optuna.logging.set_verbosity(verbosity)


def _suggest(trial: Any, name: str, space: ParameterSpace) -> Any:
    if space.choices is not None:
        return trial.suggest_categorical(name, space.choices)
    suggest = trial.suggest_int if space.type == "int" else trial.suggest_float
    return suggest(name, space.low, space.high, log=space.log)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [dict(each) for each in read_json(path)]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged ({error!r}). Choose another output to search again.") from error
