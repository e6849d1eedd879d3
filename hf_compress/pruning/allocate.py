"""From scores and a sparsity to masks: who pays, and how much."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.registry import allocators


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What every single layer must respect."""

    min_units: int = 1
    """Units kept at least."""

    max_sparsity: float = 1.0
    """Largest fraction removed."""

    multiple_of: int = 1
    """Kept counts are multiples of this, or all units."""

    def floor(self, num_units: int) -> int:
        """Return the smallest number of units that a layer of ``num_units`` may keep."""
        wanted = max(self.min_units, math.ceil(num_units * (1 - self.max_sparsity) - 1e-9))
        return min(-(-wanted // self.multiple_of) * self.multiple_of, num_units)


Allocator = Callable[[Mapping[str, Tensor], float, Limits], dict[str, Tensor]]
"""(scores [num_units] by group, sparsity, limits) -> bool masks by group, True = keep."""


@allocators.register("per_layer")
def per_layer(scores: Mapping[str, Tensor], sparsity: float, limits: Limits) -> dict[str, Tensor]:
    """Every group loses the same fraction of its units, its lowest scores first."""
    masks = {}
    for name, score in scores.items():
        size = len(score)
        kept = _round_to_multiple((1 - sparsity) * size, limits.multiple_of)
        masks[name] = _keep_best(score, min(max(kept, limits.floor(size)), size))
    return masks


@allocators.register("global")
def global_(scores: Mapping[str, Tensor], sparsity: float, limits: Limits) -> dict[str, Tensor]:
    """The lowest scores of all groups together go, as far as the limits of each group allow.

    With ``multiple_of`` > 1, whole blocks of neighbours in rank compete by their mean score.
    """
    sizes = {name: len(score) for name, score in scores.items()}
    counts = {name: limits.floor(size) for name, size in sizes.items()}
    budget = (1 - sparsity) * sum(sizes.values()) - sum(counts.values())
    for _, name, size in _blocks(scores, counts, limits.multiple_of):
        if budget < size / 2:  # the next block would overshoot by more than it fills
            break
        counts[name] += size
        budget -= size
    return {name: _keep_best(score, counts[name]) for name, score in scores.items()}


def _blocks(scores: Mapping[str, Tensor], floors: Mapping[str, int], block: int) -> list[tuple[float, str, int]]:
    """Return (mean score, group, size) of the blocks above each group's floor, best first.

    Within a group a better-ranked block never has a lower mean, so taking blocks in this order keeps prefixes.
    """
    found = []
    for position, (name, score) in enumerate(scores.items()):
        ranked = score.sort(descending=True).values
        for start in range(floors[name], len(ranked), block):
            part = ranked[start : start + block]
            found.append((-float(part.mean()), position, start, name, len(part)))
    return [(-value, name, size) for value, _, _, name, size in sorted(found)]


def _round_to_multiple(count: float, multiple: int) -> int:
    return round(count / multiple) * multiple


def _keep_best(score: Tensor, count: int) -> Tensor:
    keep = torch.zeros(len(score), dtype=torch.bool)
    keep[score.argsort(descending=True, stable=True)[:count].cpu()] = True
    return keep


def check_reachable(kind: str, sizes: Mapping[str, int], sparsity: float, limits: Limits) -> None:
    """Check before training that the limits leave room for the sparsity.

    Raises:
        TargetError: If they do not.
    """
    total = sum(sizes.values())
    floor = sum(limits.floor(size) for size in sizes.values())
    if (1 - sparsity) * total < floor - tolerance(sizes, limits) * total:
        raise TargetError(
            f"structures[{kind!r}]: sparsity {sparsity} of {total} units leaves {(1 - sparsity) * total:.1f}, but "
            f"min_units={limits.min_units}, max_layer_sparsity={limits.max_sparsity} and "
            f"multiple_of={limits.multiple_of} keep at least {floor}; the highest sparsity allowed here is "
            f"{1 - floor / total:.4f}."
        )


def tolerance(sizes: Mapping[str, int], limits: Limits) -> float:
    """Return how far the achieved sparsity may lie from the one asked for: half a block in each group."""
    return len(sizes) * max(limits.multiple_of, 1) / 2 / sum(sizes.values())


def achieved_sparsity(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of all units that the masks remove."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total
