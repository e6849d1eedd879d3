"""Sentences that model cards and reports share."""

import json

from hf_compress.report.compare import Comparison
from hf_compress.report.results import Results

UNNAMED = "path/or/hub-name"
"""Stands for the name of a model that has none yet."""


def measured_on(results: Results) -> str:
    """Say on what the numbers of a model's comparison were measured."""
    return (
        f"Metrics on {results.num_evaluation_examples:,} {results.evaluation_split} examples. "
        f"{costs_measured_on(results.table())}"
    )


def costs_measured_on(table: Comparison) -> str:
    """Say on what sizes, operations and latencies were measured."""
    profile = next(iter(table.profiles.values()))
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in profile.inputs.items())
    return (
        f"Operations and peak memory for one forward pass with {shapes}. Latencies are medians, all models timed in "
        f"turns in one run on {profile.num_threads} CPU threads; percentages and ratios refer to the first column."
    )


def loading_code(auto_class: str, name: str = UNNAMED) -> str:
    """Return the Python lines that load a compressed model.

    Args:
        auto_class: Class that loads it.
        name: Its folder or Hub name.
    """
    return (
        f"from transformers import {auto_class}\n"
        "import hf_compress  # registers the loader of models whose layers differ in size\n\n"
        f"model = {auto_class}.from_pretrained({json.dumps(name)})"
    )
