"""Every task: gradients of a Trainer with the callback, and of a Trainer whose loss was written by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taught_tasks import ALPHA, TASKS, TEMPERATURE, differences
from torch import Tensor
from training_runs import slow_unless

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.config import DistillationConfig, Ramp
from hf_compress.errors import ConfigError

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


@pytest.mark.parametrize(
    ("name", "option"),
    [
        slow_unless(
            name in ("classes", "next tokens") or option == "smoothed labels", name, option, name=f"{name}-{option}"
        )
        for name in ("classes", "next tokens", "t5", "bart")
        for option in OPTIONS
    ],
)
def test_the_gradient_is_that_of_the_loss_by_hand_whatever_the_trainer_does(
    make_trainer: Any, name: str, option: str
) -> None:
    assert max(differences(make_trainer, TASKS[name], taught, **RAGGED, **OPTIONS[option])) <= 1e-6


def test_answers_are_taught_where_the_trainer_smooths_other_labels(make_trainer: Any) -> None:
    """It ignores label_smoothing_factor where there are no ``labels``."""
    assert max(differences(make_trainer, TASKS["answers"], taught, **RAGGED, label_smoothing_factor=0.1)) <= 1e-6


@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon", "soft_cross_entropy", "mse", "binary_kl"])
def test_padding_of_answers_gives_no_loss_a_nan(make_trainer: Any, loss: str) -> None:
    task = TASKS["answers"]
    callback = DistillationCallback(DistillationConfig(loss=loss), task.teacher())
    trainer = make_trainer(task.student(), task.data(), [callback], logging_strategy="steps", logging_steps=1)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert 0 < entry["distillation_loss"] < float("inf")
        assert 0 < entry["grad_norm"] < float("inf")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("value", {"loss": "kl"}, r"loss: got 'kl', .* over classes; .* regression\. Allowed: 'mse', or 'auto'"),
        ("several values", {"loss": "jensen_shannon"}, r"Allowed: 'mse', or 'auto'"),
        ("several labels", {"loss": "kl"}, r"multi_label_classification\. Allowed: 'binary_kl', 'mse', or 'auto'"),
        ("several labels by their type", {"loss": "kl"}, "Allowed: 'binary_kl', 'mse', or 'auto'"),
        ("value", {"temperature": 3}, r"temperature: got 3; allowed: 2\.0, .* for regression, whose loss \(mse\)"),
        ("several values", {"temperature": Ramp(start=1.0, stop=2.0)}, "temperature: got 1 to 2, linear"),
    ],
)
def test_settings_that_mean_nothing_for_a_task_are_refused(
    make_trainer: Any, name: str, settings: dict[str, Any], message: str
) -> None:
    task = TASKS[name]
    callback = DistillationCallback(DistillationConfig(**settings), task.teacher())
    trainer = make_trainer(task.student(), task.data(), [callback])
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
