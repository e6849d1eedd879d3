"""Compress a text classifier end to end: fine-tune a dense teacher, then prune, distill and quantize in one Trainer.

Run it with ``bash scripts/demo``; without arguments it takes all-MiniLM-L6-v2 and movie-review snippets.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import demo_data
import torch
import transformers
from demo_report import INT8, SMALL, console, measure, reloads_bit_identically, show, write_results
from demo_settings import Settings
from demo_task import Task, evaluation_batches, prepare, weights_fingerprint
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_compress import (
    CompressionError,
    ConfigError,
    DatasetConfig,
    DistillationCallback,
    PruningCallback,
    QuantizationCallback,
    dimension_groups,
    export_quantized,
    shrink,
)
from hf_compress.recipe.splits import Splits, load_splits
from hf_compress.report.results import kept_units

NUM_STEPS = 6


def announce(step: int, text: str) -> None:
    """Print the heading of a step."""
    console.rule(f"[bold]{step}/{NUM_STEPS}  {text}", align="left")


def load_task(settings: Settings) -> tuple[str, PreTrainedTokenizerBase, Task]:
    """Return the pretrained model's name or folder, its tokenizer and the data."""
    source = settings.model or str(demo_data.model_folder())
    if settings.dataset is None:
        splits = Splits(*demo_data.movie_snippets(), "test")
    else:
        data = DatasetConfig(path=settings.dataset, name=settings.dataset_config, eval_split=settings.test_split)
        splits = load_splits(data, settings.label_column, settings.seed)
    if settings.train_examples is not None:
        count = min(settings.train_examples, len(splits.train))
        splits = replace(splits, train=splits.train.shuffle(seed=settings.seed).select(range(count)))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {source}: cannot be loaded from the Hub or from disk: {error}") from error
    columns = (settings.text_column, settings.text_pair_column, settings.label_column)
    task = prepare(splits, columns, tokenizer, settings.max_length)
    console.print(
        f"{source}: {len(task.train):,} training and {len(task.test):,} {task.test_split} examples, labels "
        f"{', '.join(task.labels)}"
    )
    return source, tokenizer, task


def make_trainer(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    folder: str,
    callbacks: list[Any] | None = None,
) -> Trainer:
    """Return a plain Trainer; the callbacks are all that sets compression apart."""
    dense = callbacks is None
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.teacher_epochs if dense else settings.epochs,
        learning_rate=settings.teacher_learning_rate if dense else settings.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="group_by_length",
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(model, arguments, train_dataset=task.train, processing_class=tokenizer, callbacks=callbacks)


def load_classifier(source: str, task: Task, new_head: bool) -> PreTrainedModel:
    """Load the pretrained model with a head for the task's labels, a new one where it has none that fits.

    Raises:
        ConfigError: If a new head would be needed but is not going to be trained, or the model cannot be loaded.
    """
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": new_head, "output_loading_info": True}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(source, **options, **task.model_options())
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--model {source}: cannot be loaded for {len(task.labels)} labels: {error}") from error
    if report["missing_keys"] and not new_head:
        raise ConfigError(f"--teacher-epochs 0: {source} has no trained {min(report['missing_keys'])}.")
    return model


def train_teacher(
    settings: Settings, source: str, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[PreTrainedModel, float]:
    """Fine-tune the dense model, or take it from the cache; also return the seconds that it took."""
    torch.manual_seed(settings.seed)
    model = load_classifier(source, task, new_head=settings.teacher_epochs > 0)
    if settings.teacher_epochs == 0:
        return model, 0.0
    names = ("max_length", "batch_size", "teacher_epochs", "teacher_learning_rate", "seed")
    facts: dict[str, Any] = {name: getattr(settings, name) for name in names}
    facts |= {"model": weights_fingerprint(model), "data": task.fingerprint, "torch": torch.__version__}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = demo_data.cache_root() / "teachers" / key
    if not (folder / "facts.json").exists() or settings.refresh:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            make_trainer(model, task, tokenizer, settings, scratch).train()
        facts["seconds"] = round(time.perf_counter() - start, 1)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "facts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    else:
        console.print(f"cached: {folder}")
    seconds = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["seconds"]
    return AutoModelForSequenceClassification.from_pretrained(folder), seconds


def compress(
    settings: Settings, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]:
    """One ``Trainer.train()`` with three callbacks, then ``shrink``.

    Returns:
        The small model, what every layer kept, and facts about the run.
    """
    student = AutoModelForSequenceClassification.from_pretrained(teacher.config._name_or_path)
    recipe = settings.recipe()
    groups = dimension_groups(student)
    pruning = PruningCallback(recipe.pruning)
    callbacks = [
        pruning,
        DistillationCallback(recipe.distillation, teacher=teacher),
        QuantizationCallback(recipe.quantization),
    ]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(student, task, tokenizer, settings, scratch, callbacks)
        outcome = trainer.train()
        small = shrink(trainer)
    facts = {
        "optimizer_steps": outcome.global_step,
        "compression_seconds": round(time.perf_counter() - start, 1),
        "final_training_loss": round(outcome.training_loss, 4),
    }
    return small, kept_units(groups, pruning.masks()), facts


def run(settings: Settings) -> None:
    """Do all steps."""
    start = time.perf_counter()
    settings.recipe()  # a wrong setting is an error now, not after the teacher
    announce(1, "model and data")
    source, tokenizer, task = load_task(settings)
    announce(2, "fine-tune the dense model: it is the baseline and the teacher")
    dense, teacher_seconds = train_teacher(settings, source, tokenizer, task)
    announce(3, "prune, distill and quantize in one Trainer.train()")
    small, kept, training = compress(settings, dense, tokenizer, task)
    announce(4, "save, and export with int8 weights")
    output = Path(settings.output)
    folders = {SMALL: output / "compressed", INT8: output / "compressed-int8"}
    small.save_pretrained(folders[SMALL])
    export_quantized(small, folders[INT8])
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    announce(5, "reload in a fresh process")
    inputs, _ = next(evaluation_batches(task.test, tokenizer, settings.max_length))
    if not reloads_bit_identically(small, folders[SMALL], inputs):
        raise CompressionError(
            f"{folders[SMALL]}: reloaded in a fresh process, the logits differ from the saved model's."
        )
    check = "reloaded in a fresh process with from_pretrained, the logits are bit-identical to the trained model's"
    console.print(f"{folders[SMALL]}: {check}")
    announce(6, "measure")
    table = measure(dense, folders, tokenizer, task, settings.max_length)
    training |= {"teacher_seconds": teacher_seconds}
    write_results(settings, task, table, folders, kept, training, [check])
    show(table)
    for name, folder in folders.items():
        console.print(f"{name}: {folder} (model, README.md, results.json, kept_units.png)")
    console.print(f"done in {(time.perf_counter() - start) / 60:.1f} minutes")


def main() -> None:
    """Parse the arguments and run; known errors end with one message and exit code 2."""
    (settings,) = HfArgumentParser(Settings, prog="scripts/demo", description=__doc__).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take no time
    datasets.disable_progress_bars()
    try:
        run(settings)
    except (CompressionError, demo_data.DemoDataError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
