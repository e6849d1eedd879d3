"""How much, when: pure functions of training progress, and moments of a run in optimizer steps."""

import re
from collections.abc import Callable
from functools import partial

from hf_compress.errors import ConfigError
from hf_compress.registry import Registry

Curve = Callable[[float], float]
"""Maps progress within the pruning window, in [0, 1], to the fraction of the final value, in [0, 1]."""

Moment = int | float | str
"""When something happens: an int is an optimizer step, a float a fraction of the run, ``"1.5 epochs"`` epochs."""

schedules: Registry[Curve] = Registry("schedule")

POLYNOMIAL = "polynomial"
"""The one schedule with a parameter, see ``polynomial``."""

STEPS = "steps"
"""The schedule that is a list of moments, given in the config, and no curve."""

LOTTERY_TICKET = "lottery_ticket"
"""The schedule of rounds that rewind the weights, see ``rounds``."""

_EPOCHS = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *epochs?")


@schedules.register("one_shot")
def one_shot(progress: float) -> float:
    """Everything at the start of the window."""
    return 1.0


@schedules.register("linear")
def linear(progress: float) -> float:
    """A constant increment per step (the cubic schedule below with exponent 1)."""
    return progress


@schedules.register("cubic", "agp")
def cubic(progress: float) -> float:
    """Fast at first, slow at the end: 1 - (1 - p)^3. ``agp`` (automated gradual pruning) is the same.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1.
    """
    return polynomial(progress, 3.0)


def polynomial(progress: float, power: float) -> float:
    """Fast at first, slow at the end: 1 - (1 - p)^power, any power > 0; slow at first below 1.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1, whose exponent is 3.
    """
    return float(1.0 - (1.0 - progress) ** power)


def curve(name: str, power: float) -> Curve:
    """Return the schedule of that name; ``power`` is read by ``polynomial`` alone.

    Raises:
        ConfigError: If there is no such curve.
    """
    return partial(polynomial, power=power) if name == POLYNOMIAL else schedules.get(name)


def ticket_rounds(begin: int, end: int, num_rounds: int, final: float) -> list[tuple[int, float]]:
    """Return the ends of equal parts of a window, each with the share of the final sparsity that is due there.

    Each round removes the same fraction of what is left: s_k = 1 - (1 - s)^(k / num_rounds).

    Args:
        begin: First step of the window.
        end: Its last step, at least ``num_rounds`` later.
        num_rounds: Into how many parts the window is cut.
        final: The final sparsity s, in [0, 1).

    Source: Frankle and Carbin 2019, arXiv:1803.03635, section 1: each round prunes s^(1/n) of what survived.
    """
    found = []
    for k in range(1, num_rounds + 1):
        part = k / num_rounds
        share = (1 - (1 - final) ** part) / final if final > 0 else part
        found.append((begin + round((end - begin) * part), 1.0 if k == num_rounds else share))
    return found


def progress_at(step: int, begin: int, end: int) -> float:
    """Return how far ``step`` lies in the window [begin, end], clipped to [0, 1].

    Args:
        step: Optimizer steps done so far.
        begin: First step of the window.
        end: Step at which the window is over.
    """
    if step >= end:
        return 1.0
    return 0.0 if step <= begin else (step - begin) / (end - begin)


def parse_epochs(when: str) -> float:
    """Return the number in a text such as ``"1.5 epochs"``.

    Raises:
        ConfigError: If the text is anything else.
    """
    found = _EPOCHS.fullmatch(when.strip())
    if found is None:
        raise ConfigError(f"got {when!r}; allowed as a text: a number of epochs, such as '1.5 epochs'.")
    return float(found[1])


def gap(begin: Moment, end: Moment) -> float | None:
    """Return how much later ``end`` is, in the unit of both; None for unlike ones, of which only the run can tell.

    Raises:
        ConfigError: For a text that is no number of epochs.
    """
    if isinstance(begin, str) and isinstance(end, str):
        return parse_epochs(end) - parse_epochs(begin)
    if isinstance(begin, str) or isinstance(end, str) or type(begin) is not type(end):
        return None
    return end - begin


def to_steps(when: Moment, total_steps: int, steps_per_epoch: Callable[[], int] | None = None) -> int:
    """Return a moment in optimizer steps.

    Args:
        when: An int is a step already, a float is a fraction of the run, a text a number of epochs.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Says how many optimizer steps an epoch has; asked only for epochs.

    Raises:
        ConfigError: For epochs in a run whose epochs have no known length.
    """
    if isinstance(when, int):
        return when
    if isinstance(when, float):
        return round(when * total_steps)
    if steps_per_epoch is None:
        raise ConfigError(f"{when!r}: the length of an epoch is not known here; give a step or a fraction of the run.")
    return round(parse_epochs(when) * steps_per_epoch())
