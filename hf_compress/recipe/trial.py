"""Dry runs: every stage previewed, the later ones on what trial masks leave."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.callbacks.distillation import Source
from hf_compress.callbacks.preview import Preview, count_steps, preview
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.config import Recipe
from hf_compress.recipe.before import prune_before
from hf_compress.recipe.callbacks import make_callbacks
from hf_compress.recipe.lora import with_adapters, without_adapters
from hf_compress.recipe.models import Loaded
from hf_compress.recipe.stages import Stage, naming, with_what_is_left
from hf_compress.recipe.trainer import Prepared, for_run, make_trainer
from hf_compress.shrinking.apply import plain_copy
from hf_compress.shrinking.shrink import shrink


def preview_stages(
    prepared: Prepared, stages: Sequence[Stage], scratch: Path
) -> tuple[dict[str, Preview], tuple[str, ...]]:
    """Return the name of every stage and what it is going to do, and the notes of all.

    Args:
        prepared: With the dense model.
        stages: The runs.
        scratch: A folder that the Trainers may make.

    Raises:
        CompressionError: If one cannot be carried out; with the name of the stage, if the recipe has stages.
    """
    found: dict[str, Preview] = {}
    notes: list[str] = []
    previews = _previews(prepared, stages, scratch)
    for stage in stages:
        with naming(prepared.recipe, stage):
            changed, found[stage.name] = next(previews)
        notes += changed.notes
    return found, tuple(notes)


def _previews(prepared: Prepared, stages: Sequence[Stage], scratch: Path) -> Iterator[tuple[Stage, Preview]]:
    student = prepared.student
    taught_by = {name for stage in stages for name in stage.recipe.teachers()}
    to_come: dict[str, PreTrainedModel] = {}
    for number, stage in enumerate(stages):
        stage = with_what_is_left(stage, stages[:number], student.model)
        prepared = for_run(prepared, stage.recipe, scratch, student)
        sections: dict[str, Mapping[str, Any]] = {}
        if stage.recipe.oneshot_batches is not None:
            prepared, masks = prune_before(prepared, stage)
            student = prepared.student
            sections["before training"] = {
                name: f"keeps {int(mask.sum()):,} of {len(mask):,}" for name, mask in masks.items()
            }
        if stage.recipe.lora is not None:
            prepared = with_adapters(prepared, stage.recipe.lora)
        callbacks = make_callbacks(stage.recipe, _teachers(stage.recipe, to_come))
        trainer = make_trainer(prepared, callbacks)
        found = preview(trainer) if callbacks else Preview(count_steps(trainer), {})
        if stage.recipe.lora is not None:
            student = Loaded(without_adapters(prepared.student.model), ())
        yield stage, replace(found, sections={**sections, **found.sections})
        trial = next((each.trial for each in callbacks if isinstance(each, PruningCallback)), None)
        if trial is not None and number < len(stages) - 1:
            small: PreTrainedModel = shrink(student.model, trial, **stage.shrink_options(), quantizers=False)
            student = Loaded(small, ())
        if str(stage.folder) in taught_by and not stage.is_finished():
            to_come[str(stage.folder)] = plain_copy(student.model)


def check_stages(prepared: Prepared, stages: Sequence[Stage]) -> None:
    """Check every stage against the model before the first one trains, so that no training is lost to a later one.

    Stages that prune before they train end the check: what they leave takes as long as in the run itself.

    Args:
        prepared: With the dense model, which stays as it is.
        stages: The runs, none of which has begun.

    Raises:
        CompressionError: Whatever a dry run would raise, with the name of the stage.
    """
    known = list(takewhile(lambda stage: stage.recipe.oneshot_batches is None, stages))
    copied = replace(prepared, student=replace(prepared.student, model=plain_copy(prepared.student.model)))
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        preview_stages(copied, known, Path(scratch))


def _teachers(recipe: Recipe, to_come: Mapping[str, PreTrainedModel]) -> list[Source] | None:
    """Return the teachers, in place of what an earlier stage has still to train a model of that size."""
    found: list[Source] = [plain_copy(to_come[name]) if name in to_come else name for name in recipe.teachers()]
    return found or None
