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
from quantized_models import SETTINGS as NUMBERS
from safetensors.torch import load_file, save_file
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
from hf_compress.instruments.sharded import reshard, whole
from hf_compress.registry import criteria

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FIRST, EVALUATED = torch.tensor([0]), 1
"""The first token of examples for evaluation, and of no other."""

METHODS = ("taylor", "l2", "lottery_ticket", "quantization", "distillation", "all")
SPARSITIES = {"heads": 0.5, "ffn": 0.5}
CRITERIA = tuple(name for name in criteria if criteria.get(name).trains and name not in METHODS)
BY_ADAM = ("movement", "l0", "slim")
"""Where a step does not grow with the gradient: rounding of gradients near zero decides on its sign."""

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
    settings = {"structures": SPARSITIES, "begin": 1, "end": 4, "update_every": 1, **changes}
    return PruningCallback(PruningConfig(criterion=criterion, **settings))


def callbacks_for(method: str, teacher: Any) -> list[CompressionCallback]:
    made: list[CompressionCallback] = []
    if method in CRITERIA:
        layers = criteria.get(method).structures == {"layers"}
        made.append(pruning(method, structures={"layers": 0.5} if layers else SPARSITIES))
    if method in ("taylor", "l2", "neutral", "all"):
        zero = {"structures": {"heads": 0.0, "ffn": 0.0}} if method == "neutral" else {}
        made.append(pruning("l2" if method == "l2" else "taylor", **zero))
    if method == "lottery_ticket":
        config = PruningConfig(structures=SPARSITIES, schedule=method, begin=0, end=4, rounds=4, rewind_to=0)
        made.append(PruningCallback(config))
    if method in ("quantization", "all"):
        made.append(QuantizationCallback(QuantizationConfig()))
    if method.startswith("quantization-"):
        made.append(QuantizationCallback(QuantizationConfig(**NUMBERS[method.removeprefix("quantization-")])))
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
        self.seen += [example["input_ids"] for example in batch if example["input_ids"][0] != EVALUATED]
        return default_data_collator(batch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self.watched:
            for name, tensor in callback._state()[0].items():
                self.tensors[f"step{state.global_step}.{name}"] = tensor.detach().clone()
            pruner = getattr(callback, "_pruner", None)
            for name, units in pruner.units.items() if pruner is not None else ():
                self.tensors[f"step{state.global_step}.gate.{name}"] = units.gate.value.detach().clone()


def make_trainer(
    model: Any,
    data: Any,
    watched: list[CompressionCallback],
    folder: Path,
    kind: type[Trainer] = Trainer,
    **args: Any,
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
    trainer = kind(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=data,
        eval_dataset=[{**each, "input_ids": each["input_ids"].index_fill(0, FIRST, EVALUATED)} for each in data[:6]],
        data_collator=record.collate,
        callbacks=[*watched, record],
    )
    assert trainer.accelerator.num_processes == world
    return trainer, record


def keep(trainer: Trainer, record: Record, folder: Path) -> None:
    """Write what the run came to."""
    reshard(trainer.model)
    tensors = {f"weight.{name}": whole(each.detach()) for name, each in trainer.model.named_parameters()}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    logged = [[log[key] for key in sorted(log) if "loss" in key or "sparsity" in key] for log in logs]
    for callback in record.watched:
        if isinstance(callback, PruningCallback):
            tensors |= {f"mask.{name}": mask for name, mask in callback.masks().items()}
    tensors |= record.tensors | {"seen": torch.stack(record.seen), "logged": torch.tensor(logged, dtype=torch.double)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank{rank()}.safetensors")


def train(
    folder: Path,
    kind: str,
    method: str,
    *,
    num_examples: int = 32,
    trainer_class: type[Trainer] = Trainer,
    resume: Any = None,
    **args: Any,
) -> Trainer:
    """Train in double precision, in which sums of other shapes differ by too little to round to another integer.

    What came out is kept in ``folder``.
    """
    model, teacher = MODELS[kind](), MODELS[kind]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    watched = callbacks_for(method, teacher.double())
    trainer, record = make_trainer(model.double(), examples(kind, num_examples), watched, folder, trainer_class, **args)
    trainer.train(resume_from_checkpoint=resume)
    keep(trainer, record, folder)
    return trainer


# Every BERT-like head ignores num_items_in_batch, so by default its gradient is multiplied by the number of ranks, with
# the plain Trainer too; without this argument it is what one process computes.
EQUAL = {"average_tokens_across_devices": False, "ddp_find_unused_parameters": False}
ACCUMULATED = {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": True}
RAGGED = {"num_examples": 13, "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3}

SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"bert-{method}": ("bert", method, EQUAL) for method in METHODS},
    **{f"llama-{method}": ("llama", method, ACCUMULATED) for method in METHODS},
    **{f"bert-{name}": ("bert", name, EQUAL) for name in CRITERIA if name not in BY_ADAM},
    "bert-quantization-static": ("bert", "quantization-static", EQUAL),
    "llama-quantization-static": ("llama", "quantization-static", ACCUMULATED),
    # Masks do not depend on the gradient's scale where the weights stay the same.
    "scaled": ("bert", "taylor", {"learning_rate": 0.0}),
}
"""Runs of which one process computes the same: model, method, arguments."""

RUNS = {
    **SETTINGS,
    **{f"bert-{name}": ("bert", name, EQUAL) for name in BY_ADAM},
    **{f"bert-quantization-{name}": ("bert", f"quantization-{name}", EQUAL) for name in NUMBERS},
    **{f"ragged-{method}": ("llama", method, RAGGED) for method in ("plain", "neutral", "all")},
}


def load(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    """Return what a rank kept of a run."""
    return load_file(folder / name / f"rank{rank}.safetensors")


def assert_ranks_agree(folder: Path, name: str) -> None:
    """Check that two ranks held the same after every step, although they saw other data."""
    first, second = load(folder, name, 0), load(folder, name, 1)
    assert not torch.equal(first.pop("seen"), second.pop("seen"))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    if RUNS[name][1] in ("taylor", "l2", "lottery_ticket", "all"):
        assert sum(key.startswith("step") and ".mask." in key for key in first) >= 4 * 4


def assert_same_as_one_process(folder: Path, name: str, own: Path) -> Trainer:
    """Repeat a run of ``SETTINGS`` in this process, where batches are whole, and compare."""
    kind, method, args = SETTINGS[name]
    trainer = train(own / name, kind, method, **args)
    one, two = load(own, name), load(folder, name)
    seen = torch.cat([load(folder, name, rank)["seen"] for rank in (0, 1)])
    assert sorted(seen.tolist()) == sorted(one.pop("seen").tolist())
    assert one.keys() == two.keys() - {"seen"}
    for key, tensor in one.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(tensor, two[key]), key
        elif ".score." in key:  # kept in single precision
            scale = 2 if name == "scaled" else 1
            torch.testing.assert_close(two[key], scale * tensor, rtol=1e-5, atol=1e-7, msg=key)
        elif key.startswith("weight."):
            torch.testing.assert_close(two[key], tensor, rtol=1e-9, atol=1e-9, msg=key)
        elif key == "logged" and name != "scaled":
            torch.testing.assert_close(two[key], tensor, rtol=1e-6, atol=1e-6, msg=key)
    return trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, (kind, method, args) in RUNS.items():
        train(folder / name, kind, method, **args)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
