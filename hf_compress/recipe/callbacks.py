"""The callbacks that a recipe describes."""

from collections.abc import Sequence

from transformers import TrainerCallback

from hf_compress.callbacks.distillation import DistillationCallback, Source
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.quantization import QuantizationCallback
from hf_compress.config import Recipe
from hf_compress.errors import ConfigError


def make_callbacks(recipe: Recipe, teacher: Source | Sequence[Source] | None = None) -> list[TrainerCallback]:
    """Return the callbacks of a recipe, for ``Trainer(callbacks=...)``.

    Args:
        recipe: What to do in training; what is pruned before it, data and training arguments are not looked at.
        teacher: The teacher, see ``DistillationCallback``; the recipe's by default.

    Raises:
        ConfigError: If there is distillation without a teacher, or a teacher without distillation; or if the recipe
            has stages, each of which has callbacks of its own.
    """
    if recipe.stages is not None:
        raise ConfigError(
            "make_callbacks: the recipe has stages, which are training runs of their own. Make the callbacks of each: "
            "[make_callbacks(run) for run in recipe.runs()], or use run_recipe."
        )
    teacher = recipe.with_dense(recipe.model).teacher if teacher is None else teacher
    callbacks: list[TrainerCallback] = []
    if recipe.pruning is not None and recipe.oneshot_batches is None:
        callbacks.append(PruningCallback(recipe.pruning))
    if recipe.distillation is not None:
        if teacher is None:
            raise ConfigError(
                "Recipe.teacher: got None; allowed: the Hub name or folder of a model, 'self' or 'unmasked', since the "
                "recipe distills. Set teacher, or leave distillation out."
            )
        callbacks.append(DistillationCallback(recipe.distillation, teacher))
    elif teacher is not None:
        raise ConfigError("make_callbacks: teacher is given, but the recipe has no distillation section; add one.")
    if recipe.quantization is not None:
        callbacks.append(QuantizationCallback(recipe.quantization))
    return callbacks
