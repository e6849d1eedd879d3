"""A Trainer on two ranks, and the gradients that it arrives at; for the scripts that ``ranks.on_two_ranks`` starts."""

import copy
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Gradients(TrainerCallback):
    """Keeps the last gradient that the optimizer gets, flattened."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        self.flat = torch.cat(found).clone()


def trainer_of(
    model: Any, data: Any, callbacks: Any, folder: str, kind: type[Trainer] = Trainer, **args: Any
) -> Trainer:
    """Return a Trainer of a copy of a model: one step of two micro-batches of two examples on each rank."""
    options: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        **args,
    }
    trainer = kind(
        model=copy.deepcopy(model), args=TrainingArguments(**options), train_dataset=data, callbacks=callbacks
    )
    assert trainer.accelerator.num_processes == 2
    return trainer


def trained(*args: Any, **kwargs: Any) -> Trainer:
    """Return a Trainer of ``trainer_of`` that has trained."""
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return trainer
