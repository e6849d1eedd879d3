"""Scores that need neither gradients nor single weights."""

import zlib

import torch
from torch import Tensor

from hf_compress.pruning.method import LAYERS, Evidence, Method, averaged_criterion
from hf_compress.registry import criteria


@criteria.register("random")
class Random(Method):
    """Chance: the baseline that every other criterion has to beat. Drawn once per layer, from the run's seed."""

    def start(self, name: str, evidence: Evidence) -> None:
        """Draw; the same on all ranks, whatever the order of the layers."""
        generator = torch.Generator().manual_seed(self.setting.seed + zlib.crc32(name.encode()))
        self.tensors[name] = torch.rand(evidence.num_units, generator=generator)

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return what was drawn."""
        return self.tensors[name]


@averaged_criterion("block_influence", reads="changes", structures=LAYERS)
def block_influence(evidence: Evidence) -> Tensor:
    """How much a layer changes what passes through it: 1 - mean cosine(x_in, x_out) over tokens.

    Source: Men et al. 2024, arXiv:2403.03853 (ShortGPT), eq. 1.
    """
    return evidence.changes()
