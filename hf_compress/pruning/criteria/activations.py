"""Scores from what units pass on: the inputs of their consumers, averaged over tokens and optimizer steps.

Every token counts, padding too. Only modules that see their inputs as such can be watched: Linear, Conv1D and
convolutions.
"""

import torch
from torch import Tensor

from hf_compress.pruning.method import AveragedMethod, Evidence
from hf_compress.registry import criteria

UNITS = frozenset({"heads", "ffn", "hidden", "other"})
"""The structures whose units are channels of a consumer's input."""


class _PerUnit(AveragedMethod):
    reads = frozenset({"activations"})
    structures = UNITS

    def measure(self, evidence: Evidence) -> Tensor:
        return evidence.by_unit(evidence.activations()).mean(dim=1)


@criteria.register("apoz")
class Apoz(_PerUnit):
    """Share of activations that are not zero: 1 - the average percentage of zeros.

    For GELU, SiLU and whatever else is never exactly 0, values that are not positive count as zeros.

    Source: Hu et al. 2016, arXiv:1607.03250, eq. 1.
    """

    @staticmethod
    def statistic(x: Tensor) -> Tensor:
        """Return 1 where a unit is active."""
        return (x > 0).float()


@criteria.register("mean_activation")
class MeanActivation(_PerUnit):
    """Mean magnitude of a unit's activations.

    Source: Molchanov et al. 2016, arXiv:1611.06440, section 2.2 (magnitude, because activations have both signs here).
    """

    @staticmethod
    def statistic(x: Tensor) -> Tensor:
        """Return the magnitude."""
        return x.abs().float()


@criteria.register("wanda")
class Wanda(AveragedMethod):
    """Magnitude of each weight times the norm of its input: ``|W_ij| * ||x_j||_2``; of a unit, the sum.

    The norm is the root of the mean square over tokens. Single weights compete within their output row only.

    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1 and section 3.
    """

    reads = frozenset({"activations"})
    structures = UNITS | {"weights"}
    run_length = "row"

    @staticmethod
    def statistic(x: Tensor) -> Tensor:
        """Return the square."""
        return x.float().square()

    def measure(self, evidence: Evidence) -> Tensor:
        """Return the mean square of each input channel, [channels]."""
        return evidence.activations()

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the sums over each unit's weights, [num_units]."""
        average = self.average(name)
        if average is None:
            return torch.zeros(evidence.num_units)
        return (evidence.columns() * evidence.by_unit(average.sqrt())).sum(dim=1)
