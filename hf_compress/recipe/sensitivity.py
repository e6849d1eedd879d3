"""Sensitivity to quantization, on the data that a recipe describes."""

import tempfile
from pathlib import Path

from hf_compress.config import QuantizationConfig, Recipe
from hf_compress.errors import ConfigError
from hf_compress.ptq.sensitivity import Sensitivity, quantization_sensitivity
from hf_compress.recipe.trainer import prepare


def sensitivity_on_recipe(recipe: Recipe, bits: tuple[int, ...], num_batches: int | None = None) -> Sensitivity:
    """Measure the sensitivity of a recipe's model on its evaluation data.

    Which layers and tensors are quantized is as in the recipe's section ``quantization``, if there is one.

    Args:
        recipe: With model, task and dataset; nothing of it is run.
        bits: Numbers of bits.
        num_batches: Take no more batches than these.

    Raises:
        ConfigError: If the recipe lacks a part, or the model has parts that are new and not from the checkpoint.
        CompressionError: See ``quantization_sensitivity``.
    """
    for name in ("model", "task", "dataset"):
        if getattr(recipe, name) is None:
            raise ConfigError(f"Recipe.{name}: missing; the sensitivity needs model, task and dataset.")
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe, Path(scratch))
        if prepared.student.new:
            raise ConfigError(
                f"{recipe.model}: {prepared.student.new[0]} is new, not from the checkpoint, so that the loss says "
                "nothing. Give a model that was trained for the task."
            )
        given = recipe.quantization
        config = None
        if given is not None:
            config = QuantizationConfig(
                method="ptq", **{name: getattr(given, name) for name in _SAME if getattr(given, name) is not None}
            )
        return quantization_sensitivity(
            prepared.student.model, prepared.batches(), bits, config, num_batches=num_batches
        )


_SAME = ("scheme", "weights", "inputs", "outputs", "targets", "exclude")
