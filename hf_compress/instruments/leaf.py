"""Leaf modules whose input and weight can be changed: how each class computes with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LeafKind:
    """How one class of leaf module uses its input and its weight."""

    compute: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    """(module, input, weight, bias) -> output: what the class's own forward does."""

    channel_dim: int
    """The input's channel dimension, counted from the end for linear layers and from the front for convolutions."""

    weight_in_dim: int
    """The weight dimension that is contracted with the input's channels."""

    is_linear: bool = False
    """Whether it is a product of matrices alone, whose gradients are such products too."""

    def oriented(self, weight: Tensor) -> Tensor:
        """Return a weight as [outputs, inputs...]; called on that, the weight as it is stored."""
        return weight.t() if self.weight_in_dim == 0 else weight


def _linear(module: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _conv1d(module: Conv1D, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], module.nf)


def _convolution(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = module._conv_forward(x, weight, bias)
    return output


LEAF_KINDS: dict[type[nn.Module], LeafKind] = {
    nn.Linear: LeafKind(_linear, channel_dim=-1, weight_in_dim=1, is_linear=True),
    Conv1D: LeafKind(_conv1d, channel_dim=-1, weight_in_dim=0, is_linear=True),
    nn.Conv1d: LeafKind(_convolution, channel_dim=1, weight_in_dim=1),
    nn.Conv2d: LeafKind(_convolution, channel_dim=1, weight_in_dim=1),
}
