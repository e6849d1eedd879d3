"""What a number that changes while training runs is in the step under way."""

from hf_compress.callbacks.base import Run
from hf_compress.config import Ramp
from hf_compress.errors import ConfigError
from hf_compress.schedule import progress_at, schedules, to_steps


def value_at(number: float | Ramp, run: Run) -> float:
    """Return a number, or what a ramp has come to, in the step under way."""
    if not isinstance(number, Ramp):
        return number
    begin, end = window(number, run)
    progress = progress_at(run.trainer.state.global_step, begin, end)
    return number.start + (number.stop - number.start) * schedules.get(number.schedule)(progress)


def window(ramp: Ramp, run: Run) -> tuple[int, int]:
    """Return first and last step of a ramp.

    Raises:
        ConfigError: If it ends before it begins, or the run ends before it begins.
    """
    begin, end = (to_steps(when, run.total_steps, run.steps_per_epoch) for when in (ramp.begin, ramp.end))
    if not begin <= end or begin >= run.total_steps:
        raise ConfigError(
            f"Ramp: begin={ramp.begin!r} and end={ramp.end!r} are steps {begin} and {end} of {run.total_steps}; begin "
            "must not be later than end, and lie within the run."
        )
    return begin, end
