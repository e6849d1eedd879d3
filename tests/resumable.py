"""Training runs that can be cut off and resumed; importable by processes other than pytest's."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from quantized_models import SETTINGS
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    last_complete_checkpoint,
)
from hf_compress.callbacks.state import read_state
from hf_compress.registry import criteria

NUM_STEPS = 10
STEPS_PER_EPOCH = 4

TRAINING = [name for name in criteria if criteria.get(name).trains]
QUANTIZING = [f"quantization-{name}" for name in SETTINGS]
METHODS = [*(f"pruning-{name}" for name in TRAINING), "lottery_ticket", *QUANTIZING, "distillation", "all"]


def pruning(criterion: str = "taylor", **changes: Any) -> PruningCallback:
    layers_only = criteria.get(criterion).structures == {"layers"}
    structures = {"layers": 0.5} if layers_only else {"heads": 0.5, "ffn": 0.75}
    settings = {"structures": structures, "begin": 2, "end": 8, "update_every": 2}
    return PruningCallback(PruningConfig(**{**settings, "criterion": criterion, **changes}))


def lottery_ticket() -> PruningCallback:
    """Keeps weights after step 2; rounds end after the steps 4, 6 and 8."""
    structures = {"heads": 0.5, "ffn": 0.75}
    settings = {"schedule": "lottery_ticket", "rounds": 3, "rewind_to": 2, "begin": 2, "end": 8}
    return PruningCallback(PruningConfig(structures=structures, **settings))


def quantization(**changes: Any) -> QuantizationCallback:
    return QuantizationCallback(QuantizationConfig(**{"begin": 3, **changes}))


def distillation(teacher: Any = None, **changes: Any) -> DistillationCallback:
    teacher = tiny_models.bert(hidden_size=16) if teacher is None else teacher
    return DistillationCallback(DistillationConfig(**{"alpha": 0.5, **changes}), teacher)


def callbacks_of(method: str) -> list[TrainerCallback]:
    """Fresh callbacks for one of ``METHODS``."""
    name, _, kind = method.partition("-")
    if name == "all":
        return [pruning(), distillation(), quantization()]
    makers: dict[str, Callable[[], TrainerCallback]] = {
        "pruning": lambda: pruning(kind),
        "lottery_ticket": lottery_ticket,
        "quantization": lambda: quantization(**SETTINGS[kind]),
        "distillation": distillation,
    }
    return [makers[name]()]


def trainer_of(callbacks: list[TrainerCallback], output_dir: Path, *, model: Any = None, **args: Any) -> Trainer:
    """Dropout, accumulation, a schedule of the learning rate, two and a half epochs, a checkpoint every step."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3}
        for row in torch.randint(3, 97, (4 * STEPS_PER_EPOCH, 10), generator=generator)
    ]
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 1,
        "seed": 0,
    }
    model = tiny_models.bert() if model is None else model
    return Trainer(
        model=model,
        args=TrainingArguments(**{**defaults, **args}),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: the model's, and those that the callbacks stored."""
    from safetensors.torch import load_file

    found = {
        f"{path.name}: {name}": tensor
        for path in folder.glob("*model*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for section, stored in read_state(folder).items():
        found |= {f"{section}: {name}": tensor for name, tensor in stored.tensors.items()}
    assert found
    return found


def results_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trained weights and the final masks."""
    found = dict(trainer.model.state_dict())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PruningCallback):
            found |= {f"mask {name}": mask for name, mask in callback.masks().items()}
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class PowerCutError(Exception):
    """Ends a run without any of the Trainer's own endings."""


class CutAfterSave(TrainerCallback):
    """Ends the run once the checkpoint of a step is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise PowerCutError


class StopAt(TrainerCallback):
    """Ends the run after a step, as a user who stops it does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


class AtSave(TrainerCallback):
    """Calls ``action`` with every step, just before its checkpoint is written."""

    def __init__(self, action: Callable[[int], None]) -> None:
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action(state.global_step)


def train_to_the_end(
    method: str,
    output_dir: Path,
    results: Path,
    args: dict[str, Any],
    connection: Any = None,
    kill_at: tuple[int, int] | None = None,
) -> None:
    """What a process does that may be killed: go on where the last one stopped, and store the results.

    Args:
        method: One of ``METHODS``.
        output_dir: Where the checkpoints go.
        results: The file for ``results_of``.
        args: Training arguments.
        connection: Gets every step, just before its checkpoint is written.
        kill_at: (step, n): die before the n-th operation on files while the checkpoint of that step is written.
    """
    torch.set_num_threads(1)

    def before_save(step: int) -> None:
        if connection is not None:
            connection.send(step)
        if kill_at is not None and step == kill_at[0]:
            die_at_file_operation(output_dir, kill_at[1])

    # Other weights than those of the first process, so that all have to come from the checkpoint.
    resume = last_complete_checkpoint(output_dir)
    model = tiny_models.bert() if resume is None else tiny_models.bert().apply(_clear)
    trainer = trainer_of([*callbacks_of(method), AtSave(before_save)], output_dir, model=model, **args)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(results_of(trainer), results)


def _clear(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.zero_()


def die_at_file_operation(folder: Path, number: int) -> None:
    """Kill this process, as the system would, before its ``number``-th operation on files in a folder from now on."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
            return
        # Whoever deletes a tree names its files relative to a folder.
        if event in ("os.rmdir", "os.remove") or str(args[0]).startswith(str(folder)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
