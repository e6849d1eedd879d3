"""When masks change, and how much of the final sparsity is due then."""

from dataclasses import dataclass
from typing import Self

from hf_compress.config import PruningConfig
from hf_compress.schedule import LOTTERY_TICKET, STEPS, curve, progress_at, ticket_rounds

LISTED = (STEPS, LOTTERY_TICKET)
"""Schedules that are lists of moments; the others are curves."""


@dataclass(frozen=True)
class Timetable:
    """The schedule of one config in optimizer steps."""

    config: PruningConfig

    moments: tuple[tuple[int, float], ...]
    """Milestones: a step and the share of the final sparsity that is due from there on; of a curve, its window."""

    @classmethod
    def of(cls, config: PruningConfig, moments: list[tuple[int, float]], final: float | None) -> Self:
        """Return the timetable of a config.

        Args:
            config: The config.
            moments: See ``PruningConfig.moments``.
            final: The sparsity in the end, if it is known; ``lottery_ticket`` needs it.
        """
        if config.schedule == LOTTERY_TICKET:
            assert final is not None
            moments = ticket_rounds(moments[0][0], moments[-1][0], config.rounds, final)
        return cls(config, tuple(moments))

    @property
    def begin(self) -> int:
        """The step at which pruning starts."""
        return self.moments[0][0]

    @property
    def end(self) -> int:
        """The step at which the final sparsity is reached."""
        return self.moments[-1][0]

    def share(self, step: int) -> float:
        """Return how far the sparsity has come at ``step``: 0 at first, 1 at the end of the window."""
        if self.config.schedule in LISTED:
            return max((share for moment, share in self.moments if moment <= step), default=0.0)
        if step < self.begin:
            return 0.0
        return curve(self.config.schedule, self.config.power)(progress_at(step, self.begin, self.end))

    def sparsity(self, step: int, final: float) -> float:
        """Return the sparsity that is due at ``step``.

        Args:
            step: Optimizer steps done so far.
            final: The sparsity in the end.
        """
        if step < self.begin:
            return 0.0
        first = min(self.config.initial_sparsity, final)
        return first + (final - first) * self.share(step)

    def is_due(self, step: int) -> bool:
        """Return whether the masks change after ``step`` optimizer steps."""
        if step < 1:
            return False
        if self.config.schedule in LISTED:
            return any(step == moment for moment, _ in self.moments)
        if step == self.end or not self.begin <= step <= self.end:
            return step == self.end
        return (step - self.begin) % self.config.update_every == 0 and self.sparsity(step, 1.0) > 0

    def updates(self) -> list[int]:
        """Return all steps after which the masks change."""
        return [step for step in range(max(self.begin, 1), self.end + 1) if self.is_due(step)]
