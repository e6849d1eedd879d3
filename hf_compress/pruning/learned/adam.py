"""The optimizer of what methods learn: theirs, so that the Trainer's stays as it is."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

DECAYS = (0.9, 0.999)

ALIKE = 1e-6
"""Relative difference of squared gradients that is taken for rounding."""


def adam_step(tensors: MutableMapping[str, Tensor], name: str, gradient: Tensor, learning_rate: float | Tensor) -> None:
    """Move ``tensors[name]`` by one step of Adam, in place; a gradient that is not finite moves nothing.

    Nothing waits for the device.

    Source: Kingma and Ba 2014, arXiv:1412.6980, algorithm 1, with its defaults.

    Args:
        tensors: Also keeps the state: ``<name>/mean``, ``<name>/square``, ``<name>/steps``.
        name: What moves.
        gradient: Of the same shape.
        learning_rate: Of the step; a tensor: of each entry.
    """
    finite = torch.isfinite(gradient).all()
    gradient = gradient.where(finite, 0.0)
    zeros = torch.zeros_like(gradient)
    mean = tensors.setdefault(f"{name}/mean", zeros)
    square = tensors.setdefault(f"{name}/square", zeros.clone())
    steps = tensors.setdefault(f"{name}/steps", zeros.new_zeros(()))
    new_mean = DECAYS[0] * mean + (1 - DECAYS[0]) * gradient
    new_square = DECAYS[1] * square + (1 - DECAYS[1]) * gradient.square()
    count = steps + 1
    root = (new_square / (1 - DECAYS[1] ** count)).sqrt_().add_(1e-8)
    change = new_mean / (1 - DECAYS[0] ** count) / root
    for old, new in ((mean, new_mean), (square, new_square), (steps, count)):
        old.copy_(new.where(finite, old))
    tensors[name].sub_(change.where(finite, 0.0) * learning_rate)


def told_apart(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Return whether the gradients so far said anything about which entries of ``tensors[name]`` matter.

    They did not if there were none but zeros and such as are not finite, or if all entries got alike, as from a
    penalty alone.

    Args:
        tensors: With the state that ``adam_step`` keeps.
        name: What moved.
    """
    square = tensors.get(f"{name}/square")
    if square is None:
        return False
    low, high = square.aminmax()
    return bool(high > 0) if len(square) == 1 else bool(high - low > ALIKE * high)
