"""``run_recipe``: train, evaluate, shrink, save, export, compare."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_compress.callbacks.preview import preview
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.state import last_complete_checkpoint
from hf_compress.config import Recipe
from hf_compress.errors import ConfigError
from hf_compress.export.quantized import check_format, export_quantized
from hf_compress.recipe.callbacks import make_callbacks
from hf_compress.recipe.measure import measure
from hf_compress.recipe.result import CHECKPOINTS, RECIPE_FILE, RESULT_FILE, RunResult, check_output
from hf_compress.recipe.trainer import Prepared, make_trainer, prepare
from hf_compress.shrinking.apply import plain_copy
from hf_compress.shrinking.shrink import shrink

SMALL = "compressed"


def run_recipe(recipe: Recipe, *, dry_run: bool = False, resume: bool = False) -> RunResult:
    """Do what a recipe says, from loading the model to saving the compressed one.

    The recipe's output folder gets ``recipe.yaml``, ``checkpoints``, ``compressed`` (model, tokenizer, model card), the
    same for an exported format, and ``run.json``.

    Args:
        recipe: With model, task, dataset and output.
        dry_run: Stop before the first step; the result says what the run would do. Nothing is written to the output.
        resume: Go on from the newest complete checkpoint in the output folder, or start if there is none. A finished
            run returns its result.

    Raises:
        CompressionError: If the recipe cannot be carried out.
    """
    _check_complete(recipe)
    output = check_output(recipe, resume)
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:  # a Trainer makes its folder at once
            return _preview(recipe, output, Path(scratch))
    if (output / RESULT_FILE).is_file():
        return RunResult.load(output)
    callbacks = make_callbacks(recipe)
    prepared = prepare(recipe, output / CHECKPOINTS)
    if prepared.args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        recipe.save(output / RECIPE_FILE)
    trainer = make_trainer(prepared, callbacks)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output / CHECKPOINTS) if resume else None)
    metrics = trainer.evaluate()
    small = _compressed(trainer, recipe)
    if prepared.args.process_index != 0:
        return RunResult(output=output, metrics=metrics)
    folders = _save(small, prepared, output)
    masks = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PruningCallback):
            masks = callback.masks()
    table = measure(prepared, folders, masks, trainer.state)
    result = RunResult(output=output, folders=folders, metrics=metrics, comparison=table, notes=prepared.notes())
    result.save()
    return result


def _check_complete(recipe: Recipe) -> None:
    for name in ("model", "task", "dataset", "output"):
        if getattr(recipe, name) is None:
            raise ConfigError(f"Recipe.{name}: missing; a run needs model, task, dataset and output.")
    if recipe.export is not None:
        check_format(recipe.export)


def _preview(recipe: Recipe, output: Path, scratch: Path) -> RunResult:
    callbacks = make_callbacks(recipe)
    prepared = prepare(recipe, scratch)
    trainer = make_trainer(prepared, callbacks)
    return RunResult(output=output, preview=preview(trainer), notes=prepared.notes())


def _compressed(trainer: Trainer, recipe: Recipe) -> PreTrainedModel:
    """Return the trained model without what was pruned and without anything attached, on the CPU."""
    if recipe.pruning is None:
        model: Any = plain_copy(trainer.accelerator.unwrap_model(trainer.model)).train(False)
    else:
        options = {} if recipe.shrink is None else recipe.shrink.to_dict()
        options.pop("schema_version", None)
        model = shrink(trainer, **options)
    found: PreTrainedModel = model.to("cpu")
    return found


def _save(small: PreTrainedModel, prepared: Prepared, output: Path) -> dict[str, Path]:
    """Save the model, and export it if asked to; the tokenizer goes with each."""
    recipe = prepared.recipe
    folders = {SMALL: output / SMALL}
    small.save_pretrained(folders[SMALL])
    if recipe.export is not None:
        name = f"{SMALL}-{recipe.export}"
        exclude = None if recipe.quantization is None else recipe.quantization.exclude
        folders[name] = export_quantized(small, output / name, recipe.export, exclude)
    for folder in folders.values():
        prepared.tokenizer.save_pretrained(folder)
    return folders
