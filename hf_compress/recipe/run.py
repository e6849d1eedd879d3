"""``run_recipe``: train, evaluate, shrink, save, export, compare; in one run, or in several stages."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.state import last_complete_checkpoint
from hf_compress.config import Recipe
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.export.formats.table import find_format
from hf_compress.export.quantized import check_format, check_storable, export_quantized
from hf_compress.graph.model import dimension_groups
from hf_compress.instruments.quantize import attached_quantizers
from hf_compress.instruments.sharded import first_not_finite
from hf_compress.loading import loading
from hf_compress.ptq.stored import apply_calibration_config
from hf_compress.recipe.before import prune_before
from hf_compress.recipe.callbacks import make_callbacks
from hf_compress.recipe.lora import merged, with_adapters
from hf_compress.recipe.measure import measure
from hf_compress.recipe.output import check_data, check_output, make_output
from hf_compress.recipe.publish import check_upload, publish
from hf_compress.recipe.result import CHECKPOINTS, RESULT_FILE, RunResult
from hf_compress.recipe.stages import (
    Facts,
    Stage,
    TrackedGroup,
    dense_model,
    naming,
    stages_of,
    track,
    tracked_after,
    with_what_is_left,
)
from hf_compress.recipe.trainer import Prepared, for_run, make_trainer, next_student, prepare, training_arguments
from hf_compress.recipe.trial import check_stages, preview_stages
from hf_compress.shrinking.apply import plain_copy
from hf_compress.shrinking.quantizers import cuts, move_quantizers
from hf_compress.shrinking.shrink import shrink


def run_recipe(recipe: Recipe, *, dry_run: bool = False, resume: bool = False) -> RunResult:
    """Do what a recipe says, from loading the model to saving the compressed one.

    The recipe's output folder gets ``recipe.yaml`` if it does not lie there, ``hf_compress_run.json`` (the mark that a
    run has begun, and what tells its data from others), ``checkpoints``, ``compressed`` (model, tokenizer, model card),
    the same for an exported format and for every stage but the last (``stage-1`` and so on), and ``run.json``. With
    ``hub_model_id``, ``compressed`` and the exported format are uploaded at the end. Before the first of several stages
    trains, all are checked as in a dry run, up to one that prunes before it trains.

    Args:
        recipe: With model, task, dataset and output.
        dry_run: Stop before the first step; the result says what the run would do. Nothing is written to the output.
        resume: Go on in the first stage that is not finished, from its newest complete checkpoint, or start it if there
            is none. The data must be those that the run began with, see ``data_facts``. A finished run returns its
            result.

    Raises:
        CompressionError: If the recipe cannot be carried out, or the Hub does not take the result, which is saved then.
    """
    if dry_run:
        _check_complete(recipe)
        check_upload(recipe)
        with tempfile.TemporaryDirectory() as scratch:  # a Trainer makes its folder at once
            return _preview(recipe, check_output(recipe, resume), Path(scratch))
    output, stages = check_run(recipe, resume)
    if (output / RESULT_FILE).is_file():
        return RunResult.load(output)
    prepared = prepare(recipe, output / CHECKPOINTS)
    data = prepared.data_facts()
    check_data(output, data)
    _check_storable(recipe, prepared)
    if len(stages) > 1 and not any(stage.is_finished() for stage in stages):
        check_stages(prepared, stages)
    notes = prepared.notes()
    if prepared.args.process_index == 0:
        make_output(recipe, output, data)
    metrics: Mapping[str, float] = {}
    for number, (before, stage) in enumerate(zip((None, *stages), stages, strict=False)):
        if stage.is_finished():
            continue
        with naming(recipe, stage):
            student = prepared.student if before is None else next_student(prepared, stage.recipe)
            stage = with_what_is_left(stage, stages[:number], student.model)
            prepared = for_run(prepared, stage.recipe, stage.checkpoints, student)
            metrics = _run_stage(stage, before, prepared, resume)
    if prepared.args.process_index != 0:
        return RunResult(output=output, metrics=metrics)
    prepared = replace(prepared, recipe=recipe)
    dense, compressing = dense_model(recipe, stages)
    folders, facts = _results(compressing, prepared, output)
    table = measure(prepared, dense, folders, facts)
    finished = [stage.facts() for stage in stages]
    notes = (*notes, *(note for each in finished for note in each.notes))
    result = RunResult(output=output, folders=folders, metrics=finished[-1].metrics, comparison=table, notes=notes)
    result.save()
    return publish(recipe, result)


def check_run(recipe: Recipe, resume: bool) -> tuple[Path, Sequence[Stage]]:
    """Check what can be known of a run before anything is loaded; nothing is written.

    Returns:
        Its output folder and its stages: what is wrong with the last stage shows before the first one trains.

    Raises:
        ConfigError: If the recipe cannot be carried out, or may not write to its output folder.
    """
    _check_complete(recipe)
    output = check_output(recipe, resume)
    stages = stages_of(recipe, output)
    if not (output / RESULT_FILE).is_file():
        check_upload(recipe)
        for stage in stages:
            make_callbacks(stage.recipe)
            training_arguments(stage.recipe, stage.checkpoints)
    return output, stages


def _check_complete(recipe: Recipe) -> None:
    for name in ("model", "task", "dataset", "output"):
        if getattr(recipe, name) is None:
            raise ConfigError(f"Recipe.{name}: missing; a run needs model, task, dataset and output.")
    if recipe.export is not None:
        _check_export(recipe, recipe.export)


def _check_export(recipe: Recipe, format: str) -> None:
    """Check, before anything is loaded, that the last model can be exported."""
    check_format(format)
    if find_format(format).runtime != "transformers":
        raise ConfigError(
            f"Recipe.export: got {format!r}, which transformers does not load, so it cannot be measured; call "
            "export_quantized(model, folder, format) on the result instead."
        )


def _check_storable(recipe: Recipe, prepared: Prepared) -> None:
    """Check, before anything is trained, that the format can store the numbers."""
    if recipe.export is not None:
        check_storable(prepared.student.model, recipe.export, recipe.runs()[-1].quantization)


def _preview(recipe: Recipe, output: Path, scratch: Path) -> RunResult:
    prepared = prepare(recipe, scratch)
    check_data(output, prepared.data_facts())
    _check_storable(recipe, prepared)
    notes = prepared.notes()
    found, changes = preview_stages(prepared, stages_of(recipe, output), scratch)
    notes = (*notes, *changes)
    if recipe.stages is None:
        (only,) = found.values()
        return RunResult(output=output, preview=only, notes=notes)
    return RunResult(output=output, stages=found, notes=notes)


def _run_stage(stage: Stage, before: Stage | None, prepared: Prepared, resume: bool) -> Mapping[str, float]:
    """Train, evaluate, shrink and save; return the metrics."""
    main = prepared.args.process_index == 0
    tracked: tuple[TrackedGroup, ...] = before.facts().tracked if before is not None and main else ()
    removes = stage.shrinks() or stage.recipe.oneshot_batches is not None
    groups = dimension_groups(prepared.student.model) if main and removes else []
    masks: Mapping[str, Tensor] = {}
    if stage.recipe.oneshot_batches is not None:
        prepared, masks = prune_before(prepared, stage)
    if stage.recipe.lora is not None:
        prepared = with_adapters(prepared, stage.recipe.lora)
    trainer = make_trainer(prepared, make_callbacks(stage.recipe))
    with warnings.catch_warnings():  # gates that weights cannot replace are gone once the model is shrunk, below
        warnings.filterwarnings("ignore", "PruningCallback: gates stay", UserWarning)
        _train(trainer, last_complete_checkpoint(stage.checkpoints) if resume else None)
    metrics = trainer.evaluate()
    if stage.recipe.lora is not None:
        trainer.model = merged(trainer.accelerator.unwrap_model(trainer.model))
    small = _compressed(trainer, stage)
    _check_finite(small)
    if main:
        if removes:
            tracked = tracked_after(tracked or track(groups), groups, masks or _masks_of(trainer))
        facts = Facts(metrics, trainer.state.global_step, tracked, stage.notes)
        stage.save(small, prepared.processor, facts, trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _train(trainer: Trainer, checkpoint: str | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyError as error:  # known only once something was evaluated
        if "metric_for_best_model" not in str(error):
            raise
        raise ConfigError(f"Recipe.training.metric_for_best_model: {error.args[0]}") from error


def _masks_of(trainer: Trainer) -> dict[str, Tensor]:
    callbacks = trainer.callback_handler.callbacks
    return next((callback.masks() for callback in callbacks if isinstance(callback, PruningCallback)), {})


def _compressed(trainer: Trainer, stage: Stage) -> PreTrainedModel:
    """Return the trained model without what was pruned, with its quantizers alone attached to it, on the CPU."""
    if stage.shrinks():
        found = shrink(trainer, **stage.shrink_options())
    else:
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        found = plain_copy(trained).train(False)
        quantized = attached_quantizers(trained)
        move_quantizers(quantized, found, cuts(found, quantized, {}), {})
    on_cpu: PreTrainedModel = found.to("cpu")  # type: ignore[arg-type]
    return on_cpu


def _check_finite(small: PreTrainedModel) -> None:
    """Check that training has not destroyed the model: classes of NaN logits have an accuracy as well."""
    name = first_not_finite(small)
    if name is not None:
        raise TrainingError(
            f"{name!r} is NaN or infinite in places after training, so the model is not saved. Check the learning "
            "rate, the precision and the data, and begin again with another output."
        )


def _results(stages: Sequence[Stage], prepared: Prepared, output: Path) -> tuple[dict[str, Path], dict[str, Facts]]:
    """Return the folders of all models, and what is known about each; the last one is exported if asked to."""
    folders = {stage.name: stage.folder for stage in stages}
    facts = {stage.name: stage.facts() for stage in stages}
    last = stages[-1]
    if last.recipe.export is not None:
        name = f"{last.name}-{last.recipe.export}"
        with loading(str(last.folder)):
            model = prepared.task.auto_class.from_pretrained(last.folder)
        config = last.recipe.quantization
        if config is not None:  # when what happened is over now
            config = replace(config, begin=0, observe=None, freeze=None, options={})
        if last.steps.is_file():
            apply_calibration_config(model, last.steps)
            config = None
        folders[name] = export_quantized(model, output / name, last.recipe.export, config=config)
        prepared.processor.save_pretrained(folders[name])
        facts[name] = facts[last.name]
    return folders, facts
