"""Training runs of ``test_ranks.py``: the same function runs in one process there, and under torchrun here.

Every run leaves a file per rank with its weights, its masks, and what its callbacks held after every step.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import bert, llama
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
)
from hf_compress.callbacks.base import CompressionCallback
from hf_compress.instruments.sharded import whole

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
METHODS = ("taylor", "l2", "quantization", "distillation", "all")
MODELS: dict[str, Callable[..., Any]] = {"bert": lambda: bert(**NO_DROPOUT), "llama": llama}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def examples(kind: str, num_examples: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sentences with a label, or texts of unequal numbers of tokens to predict."""
    ids = torch.randint(3, 97, (num_examples, 6), generator=torch.Generator().manual_seed(0))
    if kind == "bert":
        return [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    texts = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for index, text in enumerate(texts):
        text["labels"][index % 5 + 1 :] = -100
    return texts


def pruning(criterion: str = "taylor", **changes: Any) -> PruningCallback:
    settings = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 1, "end": 4, "update_every": 1, **changes}
    return PruningCallback(PruningConfig(criterion=criterion, **settings))


def callbacks_for(method: str, teacher: Any) -> list[CompressionCallback]:
    made: list[CompressionCallback] = []
    if method in ("taylor", "l2", "neutral", "all"):
        zero = {"structures": {"heads": 0.0, "ffn": 0.0}} if method == "neutral" else {}
        made.append(pruning("l2" if method == "l2" else "taylor", **zero))
    if method in ("quantization", "all"):
        made.append(QuantizationCallback(QuantizationConfig()))
    if method in ("distillation", "all"):
        made.append(DistillationCallback(DistillationConfig(alpha=0.5), teacher=teacher))
    return made


class Record(TrainerCallback):
    """Keeps what the compression callbacks before it in the list hold after every step."""

    def __init__(self, watched: list[CompressionCallback]) -> None:
        self.watched = watched
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen: list[torch.Tensor] = []

    def collate(self, batch: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        self.seen += [example["input_ids"] for example in batch]
        return default_data_collator(batch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self.watched:
            for name, tensor in callback._state()[0].items():
                self.tensors[f"step{state.global_step}.{name}"] = tensor.detach().clone()
            for name, gate in getattr(callback, "_gates", {}).items():
                self.tensors[f"step{state.global_step}.gate.{name}"] = gate.value.detach().clone()


def make_trainer(
    model: Any, data: Any, watched: list[CompressionCallback], folder: Path, **args: Any
) -> tuple[Trainer, Record]:
    record = Record(watched)
    world = int(os.environ.get("WORLD_SIZE", "1"))  # processes meet in TrainingArguments
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 6,
        # Steps follow gradients linearly; Adam would blow rounding errors of gradients near zero up to whole steps.
        "optim": "sgd",
        "learning_rate": 0.02,
        "per_device_train_batch_size": 4 // world,
        "logging_steps": 2,
        "save_strategy": "no",
        "ddp_timeout": 60,
        **args,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=data,
        data_collator=record.collate,
        callbacks=[*watched, record],
    )
    assert trainer.accelerator.num_processes == world
    return trainer, record


def keep(trainer: Trainer, record: Record, folder: Path) -> None:
    """Write what the run came to."""
    tensors = {f"weight.{name}": whole(each.detach()) for name, each in trainer.model.named_parameters()}
    logged = [[log[key] for key in sorted(log) if "loss" in key or "sparsity" in key] for log in trainer.state.log_history]
    for callback in record.watched:
        if isinstance(callback, PruningCallback):
            tensors |= {f"mask.{name}": mask for name, mask in callback.masks().items()}
    tensors |= record.tensors | {"seen": torch.stack(record.seen), "logged": torch.tensor(logged[:-1], dtype=torch.double)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank{rank()}.safetensors")


def train(
    folder: Path, kind: str, method: str, *, num_examples: int = 32, double: bool = True, resume: Any = None, **args: Any
) -> Trainer:
    """Train, and keep what came out in ``folder``."""
    model, teacher = MODELS[kind](), MODELS[kind]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    if double:  # sums of other shapes differ by 1e-16, which flips no rounding to an integer
        model, teacher = model.double(), teacher.double()
    watched = callbacks_for(method, teacher)
    trainer, record = make_trainer(model, examples(kind, num_examples), watched, folder, **args)
    trainer.train(resume_from_checkpoint=resume)
    keep(trainer, record, folder)
    return trainer


# Every BERT-like head ignores num_items_in_batch, so by default its gradient is multiplied by the number of ranks, with
# the plain Trainer too; without this argument it is what one process computes.
EQUAL = {"average_tokens_across_devices": False, "ddp_find_unused_parameters": False}
ACCUMULATED = {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": True}
RAGGED = {"num_examples": 13, "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3}

COMPARED: dict[str, Callable[[Path], Any]] = {
    **{f"bert-{m}": lambda folder, m=m: train(folder, "bert", m, **EQUAL) for m in METHODS},
    **{f"llama-{m}": lambda folder, m=m: train(folder, "llama", m, **ACCUMULATED) for m in METHODS},
    # Masks do not depend on the gradient's scale where the weights stay the same.
    "scaled": lambda folder: train(folder, "bert", "taylor", learning_rate=0.0),
}
"""Runs of which one process computes the same."""

RUNS: dict[str, Callable[[Path], Any]] = {
    **COMPARED,
    **{f"ragged-{m}": lambda folder, m=m: train(folder, "llama", m, **RAGGED) for m in ("plain", "neutral", "all")},
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, run in RUNS.items():
        run(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
