"""``run_sweep``: several budgets of one recipe, one after the other."""

import gc
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_compress.config import SweepConfig
from hf_compress.config.sweep import TRIAL
from hf_compress.errors import CompressionError, ConfigError
from hf_compress.recipe.result import RESULT_FILE, RunResult
from hf_compress.recipe.run import check_run, run_recipe
from hf_compress.recipe.stages import SMALL
from hf_compress.recipe.sweep_output import check_sweep_output, make_sweep_output, sweep_folder
from hf_compress.recipe.sweep_plan import PlannedRun, plan_run, share_stages, with_recipe
from hf_compress.recipe.sweep_result import FailedRun, SweepResult
from hf_compress.recipe.trials import check_optuna, run_trials
from hf_compress.report.sweep_chart import FRACTIONS, is_maximized
from hf_compress.report.sweep_table import metric, size

Progress = Callable[[str], None]


def run_sweep(
    config: SweepConfig, *, resume: bool = False, dry_run: bool = False, progress: Progress | None = None
) -> SweepResult:
    """Do all runs of a sweep, each by ``run_recipe`` in a folder of its own: ``<run>-seed<seed>``.

    Every recipe is checked before the first run trains, as far as that goes without its model. A run that fails ends
    neither the others nor the sweep. Leading stages that only train are trained once for all runs that have them alike.
    After each run, the output folder has ``sweep.json`` (all numbers), ``sweep.md`` (one table) and ``pareto.png`` (one
    chart) of what there is so far.

    Args:
        config: What to run; with output.
        resume: Leave finished runs as they are, go on with the others, and do those that failed again.
        dry_run: Train nothing; the result says what each run would do. Nothing is written.
        progress: Called with what is being run.

    Raises:
        CompressionError: If the sweep or one of its recipes cannot be carried out.
    """
    _check_one_process()
    config = with_recipe(config)
    output = sweep_folder(config)
    planned = [run for name, settings in config.settings() for run in plan_run(config, output, name, settings)]
    check_sweep_output(config, planned, resume)
    for run in [*planned, *_outermost_trials(config, output)]:
        _checked(run)
    if dry_run:
        return SweepResult(config=config, output=output, previews=_previews(planned))
    make_sweep_output(config, planned, output)
    sweep = _Sweep(config, output, planned, progress or (lambda line: None))
    for run in planned:
        sweep.do(run)
    if config.search is not None:
        num_values = 2 if config.search.against_x else 1
        sweep.best = [TRIAL.format(number) for number in run_trials(config.search, num_values, output, sweep.judge)]
    result = sweep.result()
    result.save()
    return result


class _Sweep:
    """What has been done so far.

    Args:
        config: The sweep, with its recipe's fields.
        output: Its output folder.
        known: Runs that are known beforehand.
        progress: Called with what is being run.
    """

    def __init__(self, config: SweepConfig, output: Path, known: Sequence[PlannedRun], progress: Progress) -> None:
        self.config = config
        self.output = output
        self.known = list(known)
        self.progress = progress
        self.begun: list[PlannedRun] = []
        self.finished: dict[str, RunResult] = {}
        self.failed: dict[str, FailedRun] = {}
        self.best: Sequence[str] = ()

    def do(self, run: PlannedRun) -> None:
        """Carry a run out, or read what it has left; write what there is so far."""
        self.begun.append(run)
        is_new = not (run.folder / RESULT_FILE).is_file()
        self.progress(f"{run.key}{'' if is_new else ': finished before'}")
        try:
            if is_new:
                share_stages(run, self.known)
            self.finished[run.key] = run_recipe(run.recipe, resume=True)
        except Exception as error:  # noqa: BLE001 - a run must not end the others, whatever it raises
            own = isinstance(error, CompressionError)
            self.failed[run.key] = FailedRun(str(error) or repr(error), None if own else traceback.format_exc())
            self.progress(f"{run.key} failed: {error}")
        if is_new:
            gc.collect()  # a Trainer and its model refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.result().save()

    def judge(self, number: int, settings: Mapping[str, Any]) -> Sequence[float] | None:
        """Carry out a trial; return how good it is, larger is better, or None if any of its runs failed."""
        name = TRIAL.format(number)
        try:
            runs = plan_run(self.config, self.output, name, settings)
        except ConfigError as error:  # settings that are allowed alone need not go together
            self.failed[name] = FailedRun(str(error))
            return None
        self.known += runs
        for run in runs:
            self.do(run)
        table = self.result().table()
        row = next((row for row in table.rows if (row.run, row.model) == (name, SMALL)), None)
        if row is None or len(row.seeds) < len(runs):
            return None
        better = table.find_metric(self.config.metric)
        values = [(row.statistic(metric(better)), is_maximized(self.config, better))]
        assert self.config.search is not None
        if self.config.search.against_x:
            values.append((row.statistic(size(self.config.x)), self.config.x in FRACTIONS))
        return [found.mean if more else -found.mean for found, more in values if found is not None]

    def result(self) -> SweepResult:
        """Return what there is so far."""
        return SweepResult(
            config=self.config,
            output=self.output,
            planned=tuple(self.begun),
            finished=dict(self.finished),
            failed=dict(self.failed),
            best=self.best,
        )


def _check_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "run_sweep: was started in several processes; a sweep runs in one. Start it without a launcher, or launch "
            "each run by itself: torchrun --no-python hf-compress run RECIPE --set ... --output ..."
        )


def _outermost_trials(config: SweepConfig, output: Path) -> list[PlannedRun]:
    """Return recipes with the first values of all settings that are searched, and with every other end of each."""
    if config.search is None:
        return []
    check_optuna()
    ends = {name: space.ends() for name, space in config.search.space.items()}
    first = {name: values[0] for name, values in ends.items()}
    trials = [{**first, name: value} for name, values in ends.items() for value in values]
    return [plan_run(config, output, TRIAL.format("ends"), settings)[0] for settings in trials]


def _checked(run: PlannedRun) -> None:
    try:
        check_run(run.recipe, resume=True)
    except ConfigError as error:
        raise ConfigError(f"SweepConfig, run {run.name!r}: {error}") from error


def _previews(planned: Sequence[PlannedRun]) -> dict[str, RunResult]:
    """Preview every run with the first of its seeds; the others would do the same."""
    found: dict[str, RunResult] = {}
    for run in planned:
        if run.name not in found:
            try:
                found[run.name] = run_recipe(run.recipe, dry_run=True, resume=True)
            except CompressionError as error:
                raise type(error)(f"run {run.name!r}: {error}") from error
    return found
