"""Simulated annealing: how long it searches, and how far from what it has."""

from dataclasses import dataclass

from hf_compress.config.base import Settings


@dataclass(frozen=True, kw_only=True)
class AnnealingConfig(Settings):
    """Simulated annealing (Kirkpatrick et al. 1983, "Optimization by Simulated Annealing")."""

    num_iterations: int = 100
    """Allocations that are tried. None is evaluated twice."""

    temperature: float = 0.01
    """At the start, in the units of what is evaluated, > 0: an allocation that is worse by this much is accepted with
    probability exp(-1). It should be about what single changes of an allocation make of the score."""

    cooling: float = 0.95
    """What the temperature is multiplied by after every iteration, in (0, 1]."""

    perturbation: float = 0.35
    """How far the share of units that a group keeps moves at most at the start, in (0, 1]; it shrinks with the
    temperature, to the smallest change that there is."""

    seed: int = 0
    """Of all that is random; equal seeds give equal results where evaluations do."""

    def _validate(self) -> None:
        self._check_count("num_iterations")
        self._check_number("temperature", 0, float("inf"), open_low=True, open_high=True)
        self._check_number("cooling", 0, 1, open_low=True)
        self._check_number("perturbation", 0, 1, open_low=True)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise self._error("seed", self.seed, "an int")
