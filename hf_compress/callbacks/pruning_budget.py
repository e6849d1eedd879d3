"""The budget of a pruning run, made from its config, its model and its device."""

from collections.abc import Mapping
from typing import Any

from hf_compress.callbacks.base import Run
from hf_compress.callbacks.ranks import on_first_rank
from hf_compress.config import PruningConfig
from hf_compress.errors import TrainingError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.adapters import has_adapters, merge_in_place
from hf_compress.instruments.sharded import is_sharded
from hf_compress.latency.budget import LatencyBudget
from hf_compress.pruning.whole_model import Budget, CostBudget
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
    if target is None:
        return None
    name, value = target
    if name in ("target_params", "target_flops"):
        cost = graph.costs.parameters if name == "target_params" else graph.costs.flops
        return CostBudget(name, cost, value)
    if is_sharded(run.model):
        raise TrainingError(f"PruningConfig.{name}: the model is sharded by FSDP, so no process can time it. Use DDP.")
    model = run.model
    if has_adapters(model):
        model = plain_copy(model)
        merge_in_place(model)
    batch, length = config.latency_shape
    inputs = example_inputs or make_example_inputs(model, batch_size=batch, length=length)
    inputs = {key: each.to(run.device) if hasattr(each, "to") else each for key, each in inputs.items()}
    return LatencyBudget(model, graph, inputs, (name, float(value)), on_first_rank, multiple_of=config.multiple_of)
