"""What pruning has to say in logs and previews: sparsity, sizes, schedule."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_compress.graph.costs import Costs
from hf_compress.instruments.pruner import Pruner
from hf_compress.pruning.pools import ScheduledPool

MOMENTS_SHOWN = 12
"""Changes of the masks that a preview lists."""


def metrics_of(pruner: Pruner) -> dict[str, float]:
    """Return sparsity and lowest score kept, by pool."""
    found: dict[str, float] = {}
    for pool in pruner.pools:
        for name, layers in parts_of(pool).items():
            found[f"{name}_sparsity"] = round(pool.achieved({each: pruner.masks[each] for each in layers}), 4)
        if pool.name in pruner.thresholds:
            found[f"{pool.name}_threshold"] = pruner.thresholds[pool.name]
    return found


def parts_of(pool: ScheduledPool) -> dict[str, tuple[str, ...]]:
    """Return the layers by what they are called in logs: the pool, or under a budget each structure."""
    return {pool.name: tuple(pool.layers)} if pool.budget is None else dict(pool.kinds)


def left(costs: Costs, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what the model would have if it were shrunk now.

    Args:
        costs: Of the model.
        masks: Of its dimension groups.
    """
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    lists = ((layers, masks[name]) for name, layers in costs.layers.items() if name in masks)
    gone = {layer for layers, mask in lists for layer, stays in zip(layers, mask.tolist(), strict=True) if not stays}
    return {
        "parameters": costs.parameters(kept, gone),
        "flops_kept": round(costs.flops(kept, gone) / max(costs.flops({}), 1), 4),
    }


def trial_masks(pruner: Pruner) -> dict[str, Tensor]:
    """Return masks of the final sparsity, by the size of the weights as they are; the method may find others.

    Layers of a method that finds out itself how much goes stay whole.
    """
    masks: dict[str, Tensor] = {}
    for pool in pruner.pools:
        scores = {name: pruner.units[name].evidence.weights().norm(dim=1).cpu() for name in pool.layers}
        if pool.budget is not None:
            masks |= pool.within_budget(scores, {name: pruner.masks[name] for name in pool.layers}, 1.0, last=True)
        else:
            masks |= pool.allocate(scores, pool.sparsity or 0.0)
    return masks


def plan_of(pruner: Pruner, masks: Mapping[str, Tensor], total_steps: int) -> dict[str, Any]:
    """Return what goes from each structure, and when."""
    facts: dict[str, Any] = {}
    for pool in pruner.pools:
        known = pool.budget is not None or pool.sparsity is not None
        for name, layers in parts_of(pool).items():
            mine = [masks[each] for each in layers]
            facts[name] = {
                "units": sum(len(mask) for mask in mine),
                "removed": sum(int((~mask).sum()) for mask in mine) if known else "found by the method",
                "layers": len(mine),
                "criterion": pool.config.criterion,
                "allocation": pool.config.allocation if pool.budget is None else "budget",
            }
    schedules = {str(_moments(pool)): pool for pool in pruner.pools}
    for pool in schedules.values():
        where = "" if len(schedules) == 1 else f" ({pool.name})"
        facts[f"share of the removal by step{where}"] = _moments(pool)
        facts[f"steps after it{where}"] = total_steps - pool.timetable.end
    return facts


def _moments(pool: ScheduledPool) -> dict[str, float]:
    moments = pool.timetable.updates()
    shown = moments if len(moments) <= MOMENTS_SHOWN else [*moments[: MOMENTS_SHOWN - 1], moments[-1]]
    return {f"step {step:,}": round(pool.timetable.share(step), 4) for step in shown}
