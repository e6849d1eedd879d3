"""From a recipe to a Trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_compress.callbacks.teacher import base_of
from hf_compress.callbacks.teachers import STUDENT
from hf_compress.config import Recipe
from hf_compress.config.recipe import LABELED_TASKS
from hf_compress.errors import CompressionError, ConfigError
from hf_compress.loading import load_config, loading
from hf_compress.recipe.encode import Encoder, encode, text_limit
from hf_compress.recipe.evaluate import best_class, count_correct
from hf_compress.recipe.labels import number_labels
from hf_compress.recipe.models import Loaded, load_student, load_tokenizer
from hf_compress.recipe.splits import Splits, drop_incomplete, load_splits


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs."""

    recipe: Recipe
    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    student: Loaded
    collator: Callable[[Any], Any]

    labels: tuple[str, ...]
    """Names of the labels, empty for language models."""

    @property
    def task(self) -> str:
        """The recipe's task."""
        return str(self.recipe.task)

    def batches(self) -> DataLoader[Any]:
        """Return the whole evaluation data, whatever the number of processes."""
        data: Any = self.splits.evaluation
        return DataLoader(data, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.collator)

    def notes(self) -> tuple[str, ...]:
        """Say what was loaded."""
        splits, model = self.splits, self.student.model
        lines = [
            f"model: {self.recipe.model}, a {type(model).__name__} of {model.num_parameters():,} parameters",
            f"data: {len(splits.train):,} training and {len(splits.evaluation):,} evaluation examples "
            f"({splits.evaluation_name})",
        ]
        if self.labels:
            lines.append(f"labels: {', '.join(self.labels)}")
        if self.student.new:
            lines.append(f"new, not from the checkpoint: {', '.join(self.student.new)}")
        return (*lines, *splits.notes)


def prepare(recipe: Recipe, checkpoints: Path) -> Prepared:
    """Load and tokenize everything.

    Args:
        recipe: Has a model, a task and a data set.
        checkpoints: Where the Trainer will save.

    Raises:
        ConfigError: If anything does not exist, or does not fit together.
    """
    args = training_arguments(recipe, checkpoints)
    assert recipe.model is not None and recipe.task is not None and recipe.dataset is not None
    model_config = load_config(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    with args.main_process_first(local=False, desc="data"):
        splits = load_splits(recipe.dataset, _label_column(recipe), args.seed)
        labels: tuple[str, ...] = ()
        if recipe.task in LABELED_TASKS:
            column = str(_label_column(recipe))
            known = [model_config, *(_teacher_config(name) for name in recipe.teachers() if name not in STUDENT)]
            splits = drop_incomplete(splits, [*recipe.dataset.text_columns, column])
            splits, labels = number_labels(splits, column, [_names(config) for config in known])
        splits = encode(splits, recipe.task, Encoder(tokenizer, recipe.dataset, text_limit(tokenizer, model_config)))
    set_seed(args.seed)  # for a new head
    student = load_student(recipe.model, recipe.task, tokenizer, labels)
    collator = _collator(recipe.task, tokenizer, student.model)
    return Prepared(recipe, args, tokenizer, splits, student, collator, labels)


def for_run(prepared: Prepared, recipe: Recipe, checkpoints: Path, student: Loaded) -> Prepared:
    """Return the same data for another training run.

    Args:
        prepared: What an earlier run was made of.
        recipe: The other run: its training arguments are new, its task and its data set are the same.
        checkpoints: Where the Trainer will save.
        student: The model to train.
    """
    args = training_arguments(recipe, checkpoints)
    collator = _collator(prepared.task, prepared.tokenizer, student.model)
    return replace(prepared, recipe=recipe, args=args, student=student, collator=collator)


def next_student(prepared: Prepared, recipe: Recipe) -> Loaded:
    """Load the model that an earlier run of the same task left.

    Raises:
        ConfigError: If it is not whole.
    """
    student = load_student(str(recipe.model), prepared.task, prepared.tokenizer, prepared.labels)
    if student.new:
        raise ConfigError(f"{recipe.model}: lacks {student.new[0]}, so it is damaged. Delete the folder and resume.")
    return student


def training_arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    """Return the recipe's training arguments.

    Raises:
        ConfigError: If transformers refuses one.
    """
    kind = Seq2SeqTrainingArguments if recipe.task == "seq2seq-lm" else TrainingArguments
    defaults = {"dataloader_pin_memory": torch.cuda.is_available()}
    try:
        return kind(output_dir=str(checkpoints), **{**defaults, **(recipe.training or {})})
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"Recipe.training: transformers refuses it: {' '.join(str(error).split())}") from error


def make_trainer(prepared: Prepared, callbacks: Sequence[TrainerCallback]) -> Trainer:
    """Return a plain Trainer; the callbacks are all that sets compression apart."""
    options: dict[str, Any] = {}
    if prepared.task in LABELED_TASKS:
        options = {"compute_metrics": _accuracy, "preprocess_logits_for_metrics": best_class}
    kind = Seq2SeqTrainer if prepared.task == "seq2seq-lm" else Trainer
    try:
        trainer: Trainer = kind(
            model=prepared.student.model,
            args=prepared.args,
            train_dataset=prepared.splits.train,
            eval_dataset=prepared.splits.evaluation,
            data_collator=prepared.collator,
            processing_class=prepared.tokenizer,
            callbacks=list(callbacks),
            **options,
        )
    except (ValueError, ImportError) as error:
        if isinstance(error, CompressionError):
            raise
        raise ConfigError(f"Recipe.training: the Trainer refuses it: {' '.join(str(error).split())}") from error
    return trainer


def _accuracy(predicted: Any) -> dict[str, float]:
    return count_correct(predicted.predictions, predicted.label_ids)


def _label_column(recipe: Recipe) -> str | None:
    assert recipe.dataset is not None
    return recipe.dataset.label_column or LABELED_TASKS.get(str(recipe.task))


def _teacher_config(name: str) -> Any:
    with loading(name):
        base = base_of(name)
    return load_config(base)


def _names(config: Any) -> list[str]:
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def _collator(task: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Callable[[Any], Any]:
    """Padding has no labels; an end-of-sequence token has one, also where padding is done with it."""
    if task == "text-classification":
        return DataCollatorWithPadding(tokenizer)
    if task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model if task == "seq2seq-lm" else None)
