"""Every task: gradients of a Trainer with the callback, and of a Trainer whose loss was written by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taught_tasks import ALPHA, TASKS, TEMPERATURE, differences
from torch import Tensor

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.config import DistillationConfig

RAGGED = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.0,
    "optim": "sgd",
}
"""Two optimizer steps, of three batches and of the two that are left."""


def taught(teacher: Any) -> DistillationCallback:
    without = teacher.config.problem_type == "regression" or teacher.config.num_labels == 1
    temperature = {} if without else {"temperature": TEMPERATURE}
    return DistillationCallback(DistillationConfig(alpha=ALPHA, **temperature), teacher)


@pytest.mark.parametrize("name", TASKS)
def test_the_gradient_is_that_of_the_loss_by_hand(make_trainer: Any, name: str) -> None:
    found = differences(make_trainer, TASKS[name], taught, **RAGGED)
    assert len(found) == 2
    assert max(found) <= 1e-6


def mean_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(*at_labels(outputs, labels))


def sum_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(*at_labels(outputs, labels), reduction="sum") / num_items_in_batch


def at_labels(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = outputs.logits
    return (logits, labels) if labels.dim() == 1 else (logits.flatten(0, 1), labels.flatten())


OPTIONS: dict[str, dict[str, Any]] = {
    "smoothed labels": {"label_smoothing_factor": 0.2, "per_item": True},
    "mean loss function": {"trainer_options": {"compute_loss_func": mean_loss_func}, "per_item": False},
    "sum loss function": {"trainer_options": {"compute_loss_func": sum_loss_func}, "per_item": True},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True, "dtype": torch.float32},
}
"""Options of ``differences``."""


@pytest.mark.parametrize("name", ["classes", "next tokens", "t5", "bart"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_gradient_is_that_of_the_loss_by_hand_whatever_the_trainer_does(
    make_trainer: Any, name: str, option: str
) -> None:
    assert max(differences(make_trainer, TASKS[name], taught, **RAGGED, **OPTIONS[option])) <= 1e-6
