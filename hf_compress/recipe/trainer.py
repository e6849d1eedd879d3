"""From a recipe to a Trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.import_utils import is_torch_xla_available

from hf_compress.callbacks.ranks import check_launched
from hf_compress.callbacks.teacher import base_of
from hf_compress.callbacks.teachers import STUDENT
from hf_compress.config import Recipe
from hf_compress.config.recipe import DENSE
from hf_compress.config.tasks import TASK_COLUMNS
from hf_compress.errors import CompressionError, ConfigError
from hf_compress.loading import load_config, loading
from hf_compress.recipe.data_facts import data_facts
from hf_compress.recipe.labels import number_labels
from hf_compress.recipe.models import Loaded, load_student
from hf_compress.recipe.splits import Splits, drop_incomplete, load_splits
from hf_compress.recipe.tasks.base import Evaluation, Task
from hf_compress.recipe.tasks.table import TASKS_BY_NAME


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs."""

    recipe: Recipe
    args: TrainingArguments

    processor: Any
    """Tokenizer or image processor."""

    splits: Splits
    loaded: Splits
    """The same data before they were encoded, none left out."""

    student: Loaded
    collator: Callable[[Any], Any]

    labels: tuple[str, ...]
    """Names of the classes, empty if there are none."""

    @property
    def task(self) -> Task:
        """The recipe's task."""
        return TASKS_BY_NAME[str(self.recipe.task)]

    def evaluation(self) -> Evaluation:
        """Return what ``Task.evaluate`` needs."""
        return Evaluation(self.batches(), self.splits.references, self.processor, self.args)

    def batches(self) -> DataLoader[Any]:
        """Return the whole evaluation data, whatever the number of processes."""
        data: Any = self.splits.evaluation
        return DataLoader(data, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.collator)

    def data_facts(self) -> dict[str, dict[str, Any]]:
        """Return what tells the data from others, see ``data_facts``."""
        data = self.recipe.dataset
        assert data is not None
        label = data.label_column or TASK_COLUMNS[self.task.name].label
        names = (*data.text_columns, data.target_column, data.image_column, label)
        return data_facts(self.loaded, [name for name in names if name is not None])

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
    task = TASKS_BY_NAME[recipe.task]
    model_config = load_config(recipe.model)
    processor = task.load_processor(recipe.model)
    with args.main_process_first(local=False, desc="data"):
        column = recipe.dataset.label_column or TASK_COLUMNS[recipe.task].label
        splits = loaded = load_splits(recipe.dataset, column, args.seed)
        labels: tuple[str, ...] = ()
        if column is not None and task.has_classes:
            splits, labels = _numbered(splits, recipe, column, model_config)
        splits = task.encode(splits, recipe.dataset, processor, model_config)
    set_seed(args.seed)  # for a new head
    student = load_student(recipe.model, task, processor, labels)
    collator = task.collator(processor, student.model)
    return Prepared(recipe, args, processor, splits, loaded, student, collator, labels)


def _numbered(splits: Splits, recipe: Recipe, column: str, model_config: Any) -> tuple[Splits, tuple[str, ...]]:
    """Return the data with numbers for classes, and the classes' names, in the order that a model knows if one does."""
    assert recipe.dataset is not None
    known = [model_config, *(_teacher_config(name) for name in recipe.teachers() if name not in (*STUDENT, DENSE))]
    texts = recipe.dataset.text_columns if TASK_COLUMNS[str(recipe.task)].num_texts else ()
    splits = drop_incomplete(splits, [*texts, column])
    return number_labels(
        splits, column, [_names(config) for config in known], per_word=recipe.task == "token-classification"
    )


def for_run(prepared: Prepared, recipe: Recipe, checkpoints: Path, student: Loaded) -> Prepared:
    """Return the same data for another training run.

    Args:
        prepared: What an earlier run was made of.
        recipe: The other run: its training arguments are new, its task and its data set are the same.
        checkpoints: Where the Trainer will save.
        student: The model to train.
    """
    args = training_arguments(recipe, checkpoints)
    collator = prepared.task.collator(prepared.processor, student.model)
    return replace(prepared, recipe=recipe, args=args, student=student, collator=collator)


def next_student(prepared: Prepared, recipe: Recipe) -> Loaded:
    """Load the model that an earlier run of the same task left.

    Raises:
        ConfigError: If it is not whole.
    """
    student = load_student(str(recipe.model), prepared.task, prepared.processor, prepared.labels)
    if student.new:
        raise ConfigError(f"{recipe.model}: lacks {student.new[0]}, so it is damaged. Delete the folder and resume.")
    return student


def training_arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    """Return the recipe's training arguments.

    Where there is no accelerator they say ``use_cpu``, unless the recipe says something: only then do several processes
    on CPUs train together.

    Raises:
        ConfigError: If transformers refuses one, or one has no effect.
        TrainingError: If the recipe has them count one process where a launcher started several.
    """
    task = TASKS_BY_NAME.get(str(recipe.task))
    kind = TrainingArguments if task is None else task.arguments_class
    defaults = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not (torch.accelerator.is_available() or is_torch_xla_available()),
        **(task.default_arguments if task else {}),
    }
    given = {**defaults, **(recipe.training or {})}
    if given.get("metric_for_best_model") is not None and given.get("eval_strategy", "no") in ("no", False):
        raise ConfigError(
            f"Recipe.training.metric_for_best_model: got {given['metric_for_best_model']!r}, but nothing is evaluated "
            "while training, so it would have no effect. Set eval_strategy, or leave it out."
        )
    try:
        args = kind(output_dir=str(checkpoints), **given)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"Recipe.training: transformers refuses it: {' '.join(str(error).split())}") from error
    check_launched(args)
    return args


def make_trainer(prepared: Prepared, callbacks: Sequence[TrainerCallback]) -> Trainer:
    """Return a plain Trainer; the callbacks are all that sets compression apart.

    Raises:
        ConfigError: If the Trainer, its optimizer, its scheduler or its loader refuse a training argument.
    """
    task = prepared.task
    try:
        trainer: Trainer = task.trainer_class(
            model=prepared.student.model,
            args=prepared.args,
            train_dataset=prepared.splits.train,
            eval_dataset=prepared.splits.evaluation,
            data_collator=prepared.collator,
            processing_class=prepared.processor,
            callbacks=list(callbacks),
            **task.trainer_options(prepared.processor, prepared.splits, prepared.args),
        )
        _try_out(trainer)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # RuntimeErrors: loggers, not installed
        if isinstance(error, CompressionError | torch.OutOfMemoryError):
            raise
        raise ConfigError(f"Recipe.training: the Trainer refuses it: {' '.join(str(error).split())}") from error
    return trainer


def _try_out(trainer: Trainer) -> None:
    """Make what training makes of the arguments, so that what they lack shows before it; nothing of it is kept."""
    args, data = trainer.args, cast(Any, [0])
    DataLoader(data, num_workers=args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor)
    leaves_hooks = any(word in str(args.optim) for word in ("layerwise", "lomo"))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or leaves_hooks:
        return
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.optimizer = trainer.lr_scheduler = None


def _teacher_config(name: str) -> Any:
    with loading(name):
        base = base_of(name)
    return load_config(base)


def _names(config: Any) -> list[str]:
    return [str(config.id2label[number]) for number in sorted(config.id2label)]
