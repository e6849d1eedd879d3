"""How much, when: pure functions of training progress."""

from collections.abc import Callable

from hf_compress.registry import Registry

Curve = Callable[[float], float]
"""Maps progress within the pruning window, in [0, 1], to the fraction of the final value, in [0, 1]."""

schedules: Registry[Curve] = Registry("schedule")


@schedules.register("one_shot")
def one_shot(progress: float) -> float:
    """Everything at the start of the window."""
    return 1.0


@schedules.register("linear")
def linear(progress: float) -> float:
    """A constant increment per step (the cubic schedule below with exponent 1)."""
    return progress


@schedules.register("cubic")
def cubic(progress: float) -> float:
    """Fast at first, slow at the end: 1 - (1 - p)^3.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1 with initial sparsity 0.
    """
    return 1.0 - (1.0 - progress) ** 3


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


def to_steps(when: float | int, total_steps: int) -> int:
    """Return a moment in optimizer steps: an int is a step already, a float is a fraction of the run."""
    return when if isinstance(when, int) else round(when * total_steps)
