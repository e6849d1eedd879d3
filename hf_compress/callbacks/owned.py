"""Tensors that a callback trains: neither in the model nor in the Trainer's optimizer.

Checkpoints of the model stay as they are, and so do schedulers and the wrappers of several processes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.callbacks.ranks import mean_gradients
from hf_compress.pruning.learned.adam import adam_step


class OwnedTensors:
    """Tensors by name, and the state of their optimizer."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        """What is trained, and what Adam keeps of each (``<name>/...``)."""
        self.rates: dict[str, float | Tensor] = {}
        """Learning rate of each; a tensor: of each of its entries."""

    def add(self, name: str, tensor: Tensor, rate: float | Tensor) -> None:
        """Train a tensor, which gets gradients, from now on."""
        self.tensors[name] = tensor
        self.rates[name] = rate

    def step(self, loss_scale: Tensor | float) -> None:
        """Move all by what their gradients say, averaged over ranks; forget the gradients.

        Args:
            loss_scale: What fp16 has multiplied the loss by.
        """
        trained = {name: self.tensors[name] for name in self.rates}
        gradients = mean_gradients({name: each.grad for name, each in trained.items()}, trained)
        for name, each in trained.items():
            each.grad = None
            gradient = gradients[name]
            if gradient is not None:
                with torch.no_grad():
                    adam_step(self.tensors, name, gradient / loss_scale, self.rates[name])

    def state(self) -> dict[str, Tensor]:
        """Return the tensors and the optimizer's state."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; all tensors that are trained must be there already."""
        for name, tensor in tensors.items():
            owner = self.tensors[name.partition("/")[0]]
            self.tensors[name] = tensor.to(owner.device).requires_grad_(name in self.rates)
