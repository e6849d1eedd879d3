"""From one file to a trained, compressed and saved model."""

from hf_compress.recipe.callbacks import make_callbacks
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.run import run_recipe

__all__ = ["RunResult", "make_callbacks", "run_recipe"]
