"""The budget of a pruning run, made from its config, its model and its device."""

from collections.abc import Mapping
from typing import Any

from hf_compress.callbacks.base import Run
from hf_compress.callbacks.ranks import on_first_rank
from hf_compress.config import PruningConfig
from hf_compress.config.budgets import TIMED_TARGETS
from hf_compress.errors import TrainingError
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.adapters import has_adapters, merge_in_place
from hf_compress.instruments.sharded import is_sharded
from hf_compress.latency.budget import budget_for
from hf_compress.pruning.whole_model import Budget
from hf_compress.shrinking.apply import plain_copy


def budget_of(
    run: Run, graph: ModelGraph, config: PruningConfig, example_inputs: Mapping[str, Any] | None
) -> Budget | None:
    """Return the budget that the config asks for, or None if it has none. Measures where one is of time.

    Raises:
        TrainingError: If time is to be measured on a sharded model.
        ConfigError: If the dense model is as fast as that already.
    """
    target = config.target()
    model = run.model
    if target is not None and target[0] in TIMED_TARGETS:
        if is_sharded(model):
            raise TrainingError(f"PruningConfig.{target[0]}: FSDP has sharded the model, so no process can time it.")
        if has_adapters(model):
            model = plain_copy(model)
            merge_in_place(model)
    return budget_for(config, model, graph, example_inputs, on_first_rank)
