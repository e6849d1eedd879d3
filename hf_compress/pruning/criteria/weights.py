"""Scores of the weights as they are: cheap, and blind to what the weights do."""

import torch
from torch import Tensor

from hf_compress.pruning.method import EVERYWHERE, CurrentMethod, Evidence, criterion_of_weights
from hf_compress.registry import criteria


@criterion_of_weights("l1")
def l1(weights: Tensor) -> Tensor:
    """Sum of the magnitudes of all weights of a unit.

    Source: Li et al. 2016, arXiv:1608.08710.
    """
    return weights.abs().sum(dim=1)


@criterion_of_weights("l2")
def l2(weights: Tensor) -> Tensor:
    """Euclidean norm of all weights of a unit."""
    norm: Tensor = torch.linalg.vector_norm(weights, dim=1)
    return norm


@criteria.register("level")
class Level(CurrentMethod):
    """Mean magnitude of the weights of a unit; for single weights, their magnitude.

    Source: Han et al. 2015, arXiv:1506.02626. Unlike ``l1`` it compares units of different sizes.
    """

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the means over the weights that there are, not over the zeros that fill up smaller units."""
        magnitudes, sizes = evidence.weights().abs(), evidence.unit_sizes
        return magnitudes.mean(dim=1) if sizes is None else magnitudes.sum(dim=1) / sizes.to(magnitudes.device)


@criterion_of_weights("fpgm", structures=EVERYWHERE - {"weights"})
def fpgm(weights: Tensor) -> Tensor:
    """Sum of the distances from a unit's weights to those of all other units of the layer.

    Units near the geometric median are redundant: the others can stand in for them. Single weights are numbers whose
    median says nothing of the kind.

    Source: He et al. 2019, arXiv:1811.00250, eq. 4.
    """
    # From products of matrices, as without this, distances between units near each other would be all rounding.
    distances = torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum(dim=1)
