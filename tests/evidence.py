"""Evidence for pruning methods that is made of given tensors instead of a model."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class GivenEvidence:
    """Units with one channel each."""

    given_weights: Tensor
    gradients: Tensor
    """d loss / d weight, of the weights' shape."""

    inputs: Tensor
    """What the method's statistic came to at each channel, [num_units]."""

    changed: Tensor
    share_kept: float = 1.0
    unit_sizes: Tensor | None = None
    added: list[Tensor] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        return len(self.given_weights)

    def weights(self) -> Tensor:
        return self.given_weights

    def gate_gradients(self) -> Tensor:
        return (self.given_weights * self.gradients).sum(dim=1)

    def weight_gradients(self) -> Tensor:
        return self.gradients

    def activations(self) -> Tensor:
        return self.inputs

    def by_unit(self, channels: Tensor) -> Tensor:
        return channels[:, None]

    def columns(self) -> Tensor:
        return self.given_weights.abs().sum(dim=1, keepdim=True)

    def changes(self) -> Tensor:
        return self.changed

    def density(self) -> float:
        return self.share_kept

    def permuted(self, order: Tensor) -> "GivenEvidence":
        parts = (self.given_weights, self.gradients, self.inputs, self.changed)
        return GivenEvidence(*(part[order] for part in parts), share_kept=self.share_kept)


def random_evidence(seed: int, num_units: int = 7, width: int = 5) -> GivenEvidence:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = (torch.randn(num_units, width, generator=generator) for _ in range(2))
    inputs, changed = (torch.rand(num_units, generator=generator) for _ in range(2))
    return GivenEvidence(weights, gradients, inputs, changed)
