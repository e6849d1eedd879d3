"""The optimizer of what methods learn: theirs, so that the Trainer's stays as it is."""

from collections.abc import MutableMapping

import torch
from torch import Tensor

DECAYS = (0.9, 0.999)


def adam_step(tensors: MutableMapping[str, Tensor], name: str, gradient: Tensor, learning_rate: float) -> None:
    """Move ``tensors[name]`` by one step of Adam, in place; a gradient that is not finite moves nothing.

    Source: Kingma and Ba 2014, arXiv:1412.6980, algorithm 1, with its defaults.

    Args:
        tensors: Also keeps the state: ``<name>/mean``, ``<name>/square``, ``<name>/steps``.
        name: What moves.
        gradient: Of the same shape.
        learning_rate: Of the step.
    """
    if not bool(torch.isfinite(gradient).all()):
        return
    for what in ("mean", "square"):
        if f"{name}/{what}" not in tensors:
            tensors[f"{name}/{what}"] = torch.zeros_like(gradient)
    steps = tensors.setdefault(f"{name}/steps", torch.zeros((), dtype=torch.long)).add_(1)
    mean = tensors[f"{name}/mean"].mul_(DECAYS[0]).add_(gradient, alpha=1 - DECAYS[0])
    square = tensors[f"{name}/square"].mul_(DECAYS[1]).addcmul_(gradient, gradient, value=1 - DECAYS[1])
    count = int(steps)
    root = (square / (1 - DECAYS[1] ** count)).sqrt_().add_(1e-8)
    tensors[name].addcdiv_(mean, root, value=-learning_rate / (1 - DECAYS[0] ** count))
