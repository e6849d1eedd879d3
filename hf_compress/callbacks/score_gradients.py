"""Gates whose gradients are those of the distillation loss alone, whatever else is trained with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Trainer

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.pruner import Pruner
from hf_compress.instruments.units import GroupUnits


@contextmanager
def distillation_gradients(trainer: Trainer, pruner: Pruner) -> Iterator[None]:
    """Give all gates the gradients of the loss of logits, as often as it is differentiated.

    The gradients carry all that the Trainer does to the loss: accumulation, loss scaling and the weight alpha.

    Args:
        trainer: Whose callbacks have one that distills.
        pruner: Whose gates get gradients.

    Raises:
        ConfigError: If nothing distills logits.
    """
    teaching = [
        each
        for each in trainer.callback_handler.callbacks
        if isinstance(each, DistillationCallback) and each.config.loss is not None
    ]
    if not teaching:
        raise ConfigError(
            "PruningConfig.gradients: got 'distillation', but the Trainer has no DistillationCallback that compares "
            "logits. Add one, or use gradients='training'."
        )
    gates = [each.gate for each in pruner.units.values() if isinstance(each, GroupUnits)]
    learning = [gate for gate in gates if gate.value.requires_grad]

    def add(loss: Tensor, gradient: Tensor) -> None:
        values = [gate.value for gate in learning]
        try:
            found = torch.autograd.grad(loss, values, gradient, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise _not_separable(str(error)) from error
        if all(each is None for each in found):
            raise _not_separable("no gate is reached from it.")
        for gate, each in zip(learning, found, strict=True):
            if each is not None and gate.separate is not None:
                gate.separate += each

    for gate in learning:
        gate.separate = torch.zeros_like(gate.value)
    teaching[0].listeners.append(add)
    try:
        yield
    finally:
        teaching[0].listeners.remove(add)
        for gate in learning:
            gate.separate = None


def _not_separable(why: str) -> TrainingError:
    return TrainingError(
        f"PruningConfig.gradients='distillation': the loss of logits cannot be differentiated on its own: {why} Where "
        "activations are checkpointed, set use_reentrant=False."
    )
