"""Sentences that model cards and reports share."""

import html
import json
import re

from hf_compress.report.compare import Comparison
from hf_compress.report.results import Results

UNNAMED = "path/or/hub-name"
"""Stands for the name of a model that has none yet."""


_MARKUP = re.compile(r"[\\`*\[\]|]")


def literal(text: str) -> str:
    """Return Markdown that shows a text as it is, on one line: names are what their owners made of them."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def needs(requirement: str) -> str:
    """Say what loading a model takes.

    Args:
        requirement: Such as ``"hf-compress[int8]"``.
    """
    name, _, extra = requirement.rstrip("]").partition("[")
    return f"It needs the package {name} (import hf_compress){f', installed with its extra {extra}' if extra else ''}."


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


def loading_code(auto_class: str, name: str = UNNAMED, processor_class: str | None = None) -> str:
    """Return the Python lines that load a compressed model.

    Args:
        auto_class: Class that loads it.
        name: Its folder or Hub name.
        processor_class: Class that loads its tokenizer or image processor, or None if that is not there.
    """
    classes = [auto_class] if processor_class is None else [auto_class, processor_class]
    variable = "tokenizer" if processor_class == "AutoTokenizer" else "processor"
    lines = [f"{variable} = {each}.from_pretrained({json.dumps(name)})" for each in classes[1:]]
    return (
        f"from transformers import {', '.join(classes)}\n"
        "import hf_compress  # registers the loader of models whose layers differ in size\n\n"
        + "\n".join([f"model = {auto_class}.from_pretrained({json.dumps(name)})", *lines])
    )
