"""What a stage removes before it trains: one-shot pruning on a few batches of the training data."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from hf_compress.config import WEIGHTS
from hf_compress.oneshot.prune import prune_oneshot
from hf_compress.recipe.models import Loaded
from hf_compress.recipe.stages import Stage
from hf_compress.recipe.trainer import Prepared
from hf_compress.shrinking.shrink import shrink


def prune_before(prepared: Prepared, stage: Stage) -> tuple[Prepared, dict[str, Tensor]]:
    """Prune and shrink a stage's model without training.

    Every process does the same on the same batches, so that all have the same model.

    Returns:
        The same run with the smaller model, and what was kept, by group.
    """
    recipe = stage.recipe
    assert recipe.pruning is not None and recipe.oneshot_batches is not None
    model = prepared.student.model
    found = prune_oneshot(model, _batches(prepared, recipe.oneshot_batches), recipe.pruning)
    small = model if WEIGHTS in recipe.pruning.structures else shrink(model, found.masks, **stage.shrink_options())
    return replace(prepared, student=Loaded(small, ())), found.masks


def _batches(prepared: Prepared, count: int) -> Iterator[Any]:
    """Yield the first batches of the training data."""
    size = prepared.args.per_device_train_batch_size
    data: Any = prepared.splits.train
    loader = DataLoader(data, batch_size=size, collate_fn=prepared.collator)
    return (batch for batch, _ in zip(loader, range(count), strict=False))
