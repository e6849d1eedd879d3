"""Takes the weights of a model in training back to an earlier moment, and the optimizer with them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import TrainingError
from hf_compress.instruments.sharded import is_sharded

PREFIX = "rewind."


class Rewinder:
    """Keeps all trainable parameters of one moment on the CPU, and goes back to them at others.

    Buffers, such as the running statistics of a batch norm, follow the training and stay as they are.

    Args:
        model: The model; on several ranks, the same on each.
        optimizer: Forgets the parameters that go back, as if it had never seen them; None where nothing is trained.
        moment: The optimizer step after which the parameters are kept; 0: as they are now.
        rounds: The optimizer steps after which they go back.

    Raises:
        TrainingError: If the model is sharded, or the optimizer trains copies of its parameters.

    Source: Frankle and Carbin 2019, arXiv:1803.03635; moments after 0: Frankle et al. 2020, arXiv:1912.05671.
    """

    def __init__(self, model: nn.Module, optimizer: Any, moment: int, rounds: Collection[int]) -> None:
        if is_sharded(model):
            raise TrainingError(
                'schedule="lottery_ticket": the model is sharded by FSDP, whose parts cannot go back to earlier '
                "weights. Use DDP, or another schedule."
            )
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._optimizer = optimizer
        self._check_optimizer()
        self.moment = moment
        self.rounds = frozenset(rounds)
        self._kept: dict[str, Tensor] = self._copies() if moment == 0 else {}

    def _check_optimizer(self) -> None:
        if self._optimizer is None:
            return
        trained = {id(each) for group in self._optimizer.param_groups for each in group["params"]}
        if trained.isdisjoint(map(id, self._parameters.values())):
            raise TrainingError(
                f'schedule="lottery_ticket": {type(self._optimizer).__name__} holds none of the model\'s own '
                "parameters, so it would undo going back to earlier weights. Use an optimizer that trains them "
                "directly, such as adamw_torch."
            )

    def _copies(self) -> dict[str, Tensor]:
        return {name: each.detach().to("cpu", copy=True) for name, each in self._parameters.items()}

    def after(self, step: int) -> None:
        """Keep the parameters, or go back to them, if that is due after an optimizer step."""
        if step == self.moment:
            self._kept = self._copies()
        if step not in self.rounds:
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._kept[name])
        for parameter in self._parameters.values():
            self._optimizer.state.pop(parameter, None)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs: nothing before the moment."""
        return {f"{PREFIX}{name}": each for name, each in self._kept.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over what ``state`` returned.

        Args:
            tensors: Of the whole checkpoint.
            step: The optimizer step at which it was written.

        Raises:
            TrainingError: If other parameters were trained then.
        """
        kept = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
        wanted = {name: each.shape for name, each in self._parameters.items()} if step >= self.moment else {}
        if {name: each.shape for name, each in kept.items()} != wanted:
            different = sorted(kept.keys() ^ wanted.keys()) or ["a shape"]
            raise TrainingError(
                f"PruningCallback: the checkpoint keeps earlier weights of other parameters than are trained now "
                f"(first difference: {different[0]!r}). Resume with the same model, the same parameters frozen."
            )
        self._kept = kept
