"""How much of the whole model is to be left, instead of a sparsity for each structure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_compress.config.base import Config
from hf_compress.config.structures import TRAINABLE_STRUCTURES, WEIGHTS
from hf_compress.errors import ConfigError

TARGETS = {
    "target_params": "an int > 1 (parameters) or a float in (0, 1) (share of the dense model's)",
    "target_flops": "an int > 1 (operations) or a float in (0, 1) (share of the dense model's)",
    "target_speedup": "a number > 1",
    "target_latency_ms": "a number > 0",
}
"""The budgets of which one may be given, with what they may be."""

TIMED_TARGETS = ("target_speedup", "target_latency_ms")

TIMED_STRUCTURES = ("heads", "ffn")
"""The structures whose latency is measured."""


@dataclass(frozen=True, kw_only=True)
class Budgets(Config):
    """The budgets, of which one at most may be given."""

    target_params: int | float | None = None
    """Budget: parameters of the whole model in the end, or (a float in (0, 1)) the share of them."""

    target_flops: int | float | None = None
    """Budget: operations of a forward pass in the end, or (a float in (0, 1)) the share of them."""

    target_speedup: float | None = None
    """Budget: how many times as fast as the dense model, > 1, measured on the training device: before training for
    different sizes, for the chosen ones when the schedule ends, and of the shrunk model; an error if it is missed by
    more than 10 %. Heads and ffn only."""

    target_latency_ms: float | None = None
    """Budget: milliseconds of a forward pass, measured like ``target_speedup``."""

    latency_shape: tuple[int, int] = (1, 128)
    """Batch size and length of the inputs that are timed, unless the callback has example inputs."""

    def target(self) -> tuple[str, int | float] | None:
        """Return name and value of the budget, or None if sparsities say how much goes.

        Raises:
            ConfigError: If there are several.
        """
        given = [(name, getattr(self, name)) for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"PruningConfig: got {given[0][0]} and {given[1][0]}; allowed: one budget.")
        return given[0] if given else None

    def _check_budget(self, structures: Iterable[str]) -> None:
        target = self.target()
        timed = target is not None and target[0] in TIMED_TARGETS
        shape = self.latency_shape
        if not isinstance(shape, Sequence) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise self._error("latency_shape", shape, "two ints >= 1: batch size and length")
        object.__setattr__(self, "latency_shape", tuple(shape))
        if not timed and self.latency_shape != Budgets.latency_shape:
            raise self._error("latency_shape", shape, "the default unless a speed-up or latency is asked for")
        if target is None:
            return
        if not _fits(*target):
            raise self._error(target[0], target[1], TARGETS[target[0]])
        allowed = TIMED_STRUCTURES if timed else tuple(k for k in TRAINABLE_STRUCTURES if k not in ("layers", WEIGHTS))
        for kind in structures:
            if kind in TRAINABLE_STRUCTURES and kind not in allowed:
                raise self._error("structures", kind, f"{', '.join(allowed)} with {target[0]}")


def _fits(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in TIMED_TARGETS:
        return math.isfinite(value) and value > (1 if name == "target_speedup" else 0)
    return value > 1 if isinstance(value, int) else 0 < value < 1
