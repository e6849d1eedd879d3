"""Training runs that tests compare: which callbacks take part, what is recorded, when two runs are the same."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
)
from hf_compress.instruments.attach import attachment_of

METHODS: dict[str, tuple[str, ...]] = {
    "pruning": ("pruning",),
    "quantization": ("quantization",),
    "distillation": ("distillation",),
    "all": ("pruning", "distillation", "quantization"),
}

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    # 18 examples are 5 batches of 4, 4, 4, 4 and 2, which are windows of 3 and 2 batches.
    "ragged accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "clipping": {"max_grad_norm": 1e-3},
    "weight decay": {"weight_decay": 0.5},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "another optimizer": {"optim": "adafactor"},
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "evaluation at the start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1},
}
"""Arguments of the Trainer under which compression has to work as without them; written for ``NUM_EXAMPLES``."""

SCHEDULERS: dict[str, dict[str, Any]] = {
    name: {"lr_scheduler_type": name, **extra}
    for name, extra in {
        "linear": {"warmup_steps": 2},
        "cosine": {},
        "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
        "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
        "constant": {},
        "constant_with_warmup": {"warmup_steps": 2},
        "inverse_sqrt": {"warmup_steps": 1},
        "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 0}},
        "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
        "cosine_warmup_with_min_lr": {"warmup_steps": 2, "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        "warmup_stable_decay": {"warmup_steps": 1, "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        "greedy": {"eval_strategy": "steps", "eval_steps": 1},
    }.items()
}

DELICATE = ("ragged accumulation", "reentrant checkpointing", "bf16", "fp16")
"""The options that change where gradients come from; the others are slow tests where many runs are needed."""

NUM_EXAMPLES = 18

RUNTIME = ("runtime", "per_second", "flos", "preparation_time")


def compression(
    names: Iterable[str], teacher: Any = None, *, begin: int = 0, **pruning: Any
) -> list[PruningCallback | DistillationCallback | QuantizationCallback]:
    """Callbacks that reach half the heads and half the FFN units at step 3; quantization starts at ``begin``."""
    settings = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 1, "end": 3, "update_every": 1, **pruning}
    available = {
        "pruning": lambda: PruningCallback(PruningConfig(**settings)),
        "distillation": lambda: DistillationCallback(DistillationConfig(alpha=0.5), teacher=teacher),
        "quantization": lambda: QuantizationCallback(QuantizationConfig(begin=begin)),
    }
    return [available[name]() for name in names]


def neutral(names: Iterable[str], steps: int) -> list[Any]:
    """Callbacks that change nothing before the last of ``steps``; quantization has no setting that never starts."""
    return compression(names, begin=steps - 1, structures={"heads": 0.0, "ffn": 0.0}, end=1)


def cases_of_methods(*fast: str) -> Any:
    """Parametrizes a test with every method; the default run takes the named ones."""
    return pytest.mark.parametrize("method", [slow_unless(name in fast, name, name=name) for name in METHODS])


def as_on_a_gpu(trainer: Any) -> Any:
    """Switch on what accelerate silently leaves off for ``fp16=True`` on CPUs, where torch has it: autocast, scaler."""
    if trainer.args.fp16:
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return trainer


def slow_unless(condition: bool, *values: Any, name: str) -> Any:
    """A test case that the default run leaves out unless the condition holds."""
    return pytest.param(*values, id=name, marks=[] if condition else pytest.mark.slow)


class Recorder(TrainerCallback):
    """Keeps the gradients of every optimizer step and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


class StopAt(TrainerCallback):
    """Ends training after a step; None: does not."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.step is not None and state.global_step >= self.step


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Norm of the difference, relative to the norm of ``b``."""
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def history(trainer: Any, last_step: int | None = None) -> list[dict[str, float]]:
    """What the Trainer logged up to a step, without times and without our own metrics."""
    ours = {
        *(f"{kind}_{what}" for kind in ("heads", "ffn") for what in ("sparsity", "threshold")),
        *("parameters", "flops_kept", "task_loss", "distillation_loss"),
        *("weight_rounding_error", "largest_weight_scale"),
    }
    return [
        {key: value for key, value in entry.items() if key not in ours and not key.endswith(RUNTIME)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry and (last_step is None or entry["step"] <= last_step)
    ]


def instrumented(model: Any) -> list[str]:
    """Names of the modules that have anything attached."""
    return [name for name, module in model.named_modules() if attachment_of(module) is not None]
