"""From one file to a trained, compressed and saved model."""

from hf_compress.recipe.callbacks import make_callbacks
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.run import run_recipe
from hf_compress.recipe.sweep import run_sweep
from hf_compress.recipe.sweep_result import SweepResult

__all__ = ["RunResult", "SweepResult", "make_callbacks", "run_recipe", "run_sweep"]
