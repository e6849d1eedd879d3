"""How much a unit matters: tensors in, scores out, higher = keep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_compress.registry import criteria


@dataclass(frozen=True)
class Criterion:
    """A score function and the evidence that it reads."""

    needs: Literal["gate_gradients", "weights"]
    """``gate_gradients``: d loss / d gate of one optimizer step, [num_units], averaged over steps afterwards.
    ``weights``: all weights of a unit, [num_units, weights per unit], read when the masks change."""

    score: Callable[[Tensor], Tensor]
    """Evidence -> scores [num_units], finite and non-negative."""


def _register(name: str, needs: Literal["gate_gradients", "weights"]) -> Callable[[Callable[[Tensor], Tensor]], None]:
    def add(score: Callable[[Tensor], Tensor]) -> None:
        criteria.register(name)(Criterion(needs, score))

    return add


@_register("taylor", "gate_gradients")
def taylor(gradient: Tensor) -> Tensor:
    """First-order change of the loss when a unit goes: ``|d loss / d gate|`` at gate 1.

    A gate multiplies everything that the unit passes on, so this is ``|sum over its weights of w * g|``.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8 (absolute value instead of the square).
    """
    return gradient.abs()


@_register("l2", "weights")
def l2(weights: Tensor) -> Tensor:
    """Euclidean norm of all weights of a unit."""
    norm: Tensor = torch.linalg.vector_norm(weights, dim=1)
    return norm
