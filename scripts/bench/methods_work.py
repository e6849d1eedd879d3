"""One run of the comparison of pruning methods: data, dense model, pruning, evaluation."""

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_data
import torch
from datasets import Dataset
from stand_ins.wordnet import wordnet_pairs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    profile,
    shrink,
)

REGROWING = ("movement",)
"""Methods that choose anew at every update among all units, in their publications."""


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    start: str
    steps: int
    dense_steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    allocation: str
    examples: int | None
    update_every: int | None = None
    """Steps between choices of what is masked; None for 50 choices in all."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """A classification task."""

    title: str
    labels: int

    load: Callable[[], tuple[Dataset, Dataset]]
    """Returns training and test data with ``text``, perhaps ``pair``, and ``label``."""


def _noun_relations() -> tuple[Dataset, Dataset]:
    train, test = wordnet_pairs()
    names = {"premise": "text", "hypothesis": "pair"}
    return train.rename_columns(names), test.rename_columns(names)


TASKS = {
    "movies": Task("Movie-review snippets", 2, demo_data.movie_snippets),
    "wordnet": Task("WordNet noun relations", 3, _noun_relations),
}


@functools.cache
def _prepared(task: str, settings: Settings) -> tuple[Any, Dataset, Dataset]:
    tokenizer = AutoTokenizer.from_pretrained(demo_data.model_folder())

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pair = [rows["pair"]] if "pair" in rows else []
        encoded = tokenizer(rows["text"], *pair, truncation=True, max_length=settings.max_length)
        return {**encoded, "labels": rows["label"]}

    parts = []
    for data, limit in zip(TASKS[task].load(), (settings.examples, settings.examples or 2000), strict=True):
        chosen = data if limit is None else data.select(range(min(limit, len(data))))
        parts.append(chosen.map(encode, batched=True, remove_columns=chosen.column_names))
    return tokenizer, parts[0], parts[1]


def trainer_of(model: PreTrainedModel, task: str, settings: Settings, steps: int, seed: int, **more: Any) -> Trainer:
    """Return a Trainer for a run of ``steps`` optimizer steps."""
    tokenizer, train, _ = _prepared(task, settings)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="methods-"),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=max(steps // 20, 1),
        lr_scheduler_type="linear",
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="group_by_length",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    collator = DataCollatorWithPadding(tokenizer)
    return Trainer(model=model, args=args, train_dataset=train, data_collator=collator, **more)


def batches_of(task: str, settings: Settings, count: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of training data."""
    tokenizer, train, _ = _prepared(task, settings)
    collate, size = DataCollatorWithPadding(tokenizer), settings.batch_size
    return [dict(collate([train[i] for i in range(k * size, (k + 1) * size)])) for k in range(count)]


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: str, settings: Settings) -> tuple[float, int]:
    """Return the share of right answers on the test data, and how many there are."""
    tokenizer, _, test = _prepared(task, settings)
    model.eval()
    rows = sorted(test, key=lambda row: len(row["input_ids"]))
    collate, right = DataCollatorWithPadding(tokenizer), 0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return right / len(test), len(test)


def _folder(task: str, settings: Settings) -> Path:
    names = (settings.dense_steps, settings.batch_size, settings.max_length, settings.learning_rate, settings.examples)
    return demo_data.cache_root() / "methods" / "-".join(map(str, (task, *names)))


def pretrained(task: str) -> PreTrainedModel:
    """Return the model before fine-tuning, with a new head."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        demo_data.model_folder(), num_labels=TASKS[task].labels
    )
    return model


def dense_of(task: str, settings: Settings) -> dict[str, Any]:
    """Fine-tune the dense model if it is not there yet; return its accuracy."""
    folder = _folder(task, settings)
    if not (folder / "config.json").exists():
        set_seed(0)
        model = pretrained(task)
        trainer_of(model, task, settings, settings.dense_steps, 0).train()
        model.save_pretrained(folder)
    share, count = accuracy(AutoModelForSequenceClassification.from_pretrained(folder), task, settings)
    return {"accuracy": share, "examples": count}


def run_of(
    task: str, settings: Settings, method: str, sparsity: float, seed: int, teaching: DistillationConfig | None = None
) -> dict[str, Any]:
    """Prune and train with one method, the dense model as teacher if there is to be one; return what came of it."""
    set_seed(seed)
    if settings.start == "pretrained":
        model = pretrained(task)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(_folder(task, settings))
    encoder = profile(model, latency=False).encoder_parameters
    config = PruningConfig(
        structures={"heads": sparsity, "ffn": sparsity},
        criterion=method,
        allocation=settings.allocation,
        begin=0.1,
        end=0.5,
        update_every=settings.update_every or max(settings.steps // 50, 1),
        regrow=method in REGROWING,
    )
    callbacks: list[Any] = [PruningCallback(config)]
    if teaching is not None:
        callbacks.append(DistillationCallback(teaching, teacher=str(_folder(task, settings))))
    trainer = trainer_of(model, task, settings, settings.steps, seed, callbacks=callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train()
    small = shrink(trainer)
    left = profile(small, latency=False).encoder_parameters / encoder
    share, _ = accuracy(small, task, settings)
    return {"accuracy": share, "encoder_left": round(left, 4)}
