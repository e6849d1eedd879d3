"""What a number that changes while training runs is in the step under way."""

from hf_compress.callbacks.base import Run
from hf_compress.config import DistillationConfig, Ramp
from hf_compress.errors import ConfigError
from hf_compress.schedule import progress_at, schedules, to_steps


def value_at(number: float | Ramp, run: Run) -> float:
    """Return a number, or what a ramp has come to, in the step under way.

    A window of several steps starts with ``start`` in its first and has come to ``stop`` in its last.
    """
    if not isinstance(number, Ramp):
        return number
    begin, end = _steps(number, run)
    progress = progress_at(run.trainer.state.global_step, begin, max(begin, end - 1))
    return number.start + (number.stop - number.start) * schedules.get(number.schedule)(progress)


def check_windows(config: DistillationConfig, run: Run) -> None:
    """Check that all ramps of a config fit a run.

    Raises:
        ConfigError: If one ends before it begins, or lies outside of the run.
    """
    numbers: dict[str, float | Ramp] = {
        "DistillationConfig.alpha": config.alpha,
        "DistillationConfig.temperature": config.temperature,
    }
    numbers |= {f"DistillationConfig.features[{i}].weight": each.weight for i, each in enumerate(config.features)}
    for name, number in numbers.items():
        if isinstance(number, Ramp):
            _check_window(name, number, run)


def _check_window(name: str, ramp: Ramp, run: Run) -> None:
    begin, end = _steps(ramp, run)
    if not begin <= end <= run.total_steps or begin >= run.total_steps:
        raise ConfigError(
            f"{name}: a Ramp with begin={ramp.begin!r} and end={ramp.end!r}, which are steps {begin} and {end}; the "
            f"run has {run.total_steps} optimizer steps. begin must not be later than end, and both lie within the run."
        )


def _steps(ramp: Ramp, run: Run) -> tuple[int, int]:
    begin, end = (to_steps(when, run.total_steps, run.steps_per_epoch) for when in (ramp.begin, ramp.end))
    return begin, end
