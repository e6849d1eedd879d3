"""Dry runs: every stage previewed, the later ones on what trial masks leave."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from hf_compress.callbacks.preview import Preview, preview
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.recipe.callbacks import make_callbacks
from hf_compress.recipe.models import Loaded
from hf_compress.recipe.stages import Stage
from hf_compress.recipe.trainer import Prepared, for_run, make_trainer
from hf_compress.shrinking.shrink import shrink


def preview_stages(prepared: Prepared, stages: Sequence[Stage], scratch: Path) -> Iterator[tuple[str, Preview]]:
    """Yield the name of every stage and what it is going to do.

    Args:
        prepared: With the dense model.
        stages: The runs.
        scratch: A folder that the Trainers may make.
    """
    student = prepared.student
    for stage in stages:
        prepared = for_run(prepared, stage.recipe, scratch, student)
        callbacks = make_callbacks(stage.recipe)
        yield stage.name, preview(make_trainer(prepared, callbacks))
        masks = next((each.trial for each in callbacks if isinstance(each, PruningCallback)), None)
        if masks is not None and stage is not stages[-1]:
            small: PreTrainedModel = shrink(student.model, masks, **stage.shrink_options(), quantizers=False)
            student = Loaded(small, ())
