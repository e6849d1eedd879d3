"""Pruning without training by Kwon et al.: search masks, rearrange them, tune what stays.

With gates m at 1, the loss of a trained model changes by about ``(1 - m)^T F (1 - m) / 2``, F being the Fisher
information of the gates. Its diagonal says how many units go, and where; its blocks within a layer say which ones;
least squares on a layer's outputs say how the others are scaled. Tensors in, tensors out.

Source: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv:2204.09656.

Letters in shapes: S examples, U units, O outputs, I inputs, K inputs per unit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import TargetError

MAX_SCALE = 10.0
"""A larger scale means that least squares has found nothing that would carry over to other data (section 3.3)."""

MAX_PASSES = 10
"""Passes over all units when masks are rearranged; few are enough, and each makes the objective smaller."""


@dataclass(frozen=True, eq=False)
class Family:
    """Units that compete with each other in the first step: all heads, or all feed-forward units."""

    fisher: Mapping[str, Tensor]
    """Diagonal Fisher information by group, [U] >= 0."""

    cost: Mapping[str, float]
    """Cost of one unit by group > 0, such as its multiplications."""

    floor: Mapping[str, int]
    """Units that every group keeps at least."""


def search_masks(first: Family, second: Family, budget: float) -> dict[str, Tensor]:
    """Choose the masks that lose the least Fisher information within a budget.

    For every number of units of the first family, its best are kept and the rest of the budget is filled with the best
    units of the second. Where all units of a family cost the same, no other masks lose less (section 3.1, algorithm
    1); where not, units are ranked by information per cost.

    Args:
        first: The family with few, expensive units (heads).
        second: The family with many, cheap units (feed-forward units); it may be empty.
        budget: What all kept units may cost together.

    Returns:
        Bool masks [U] by group of both families, True = keep.

    Raises:
        TargetError: If the units that have to stay cost more than the budget.
    """
    ranked = _Ranking(first), _Ranking(second)
    least = ranked[0].costs[0] + ranked[1].costs[0]
    if float(least) > budget * (1 + 1e-9):
        raise TargetError(
            f"search_masks: the budget is {budget:.6g}, but the units that every group must keep cost {least:.6g}. "
            "Allow more, or lower min_units."
        )
    left = budget * (1 + 1e-9) - ranked[0].costs
    counts = (torch.searchsorted(ranked[1].costs, left, right=True) - 1).clamp_min(0)
    total = ranked[0].information + ranked[1].information[counts]
    best = int(total.masked_fill(left < ranked[1].costs[0], -1.0).argmax())
    return ranked[0].masks(best) | ranked[1].masks(int(counts[best]))


class _Ranking:
    """The units of a family, best first, after those that have to stay."""

    def __init__(self, family: Family) -> None:
        self.sizes = {name: len(values) for name, values in family.fisher.items()}
        empty = [torch.zeros(0, dtype=torch.float64)]
        fisher = torch.cat([values.double().cpu() for values in family.fisher.values()] or empty)
        cost = torch.cat(
            [torch.full((size,), family.cost[name], dtype=torch.float64) for name, size in self.sizes.items()] or empty
        )
        stays = torch.cat(
            [_best(values, family.floor.get(name, 0)) for name, values in family.fisher.items()]
            or [torch.zeros(0, dtype=torch.bool)]
        )
        self.fixed = stays
        self.order = (fisher / cost).masked_fill(stays, -1.0).argsort(descending=True, stable=True)
        self.order = self.order[: int((~stays).sum())]
        zero = torch.zeros(1, dtype=torch.float64)
        self.costs = torch.cat([zero, cost[self.order].cumsum(0)]) + cost[stays].sum()
        self.information = torch.cat([zero, fisher[self.order].cumsum(0)])

    def masks(self, count: int) -> dict[str, Tensor]:
        """Return the masks that keep ``count`` units besides those that have to stay."""
        keep = self.fixed.clone()
        keep[self.order[:count]] = True
        parts = torch.split(keep, list(self.sizes.values())) if self.sizes else ()
        return {name: part.clone() for name, part in zip(self.sizes, parts, strict=True)}


def _best(values: Tensor, count: int) -> Tensor:
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[values.cpu().argsort(descending=True, stable=True)[:count]] = True
    return keep


def rearrange(mask: Tensor, gradients: Tensor, fixed: tuple[int, ...] = ()) -> Tensor:
    """Swap kept for removed units within a layer, as long as that makes ``||sum of removed gradients||^2`` smaller.

    The squared norm, summed over examples, is ``(1 - m)^T F (1 - m)`` with the whole Fisher information of the layer:
    units that change the loss in opposite directions can go together (section 3.2).

    Args:
        mask: Bool [U], True = keep.
        gradients: d loss / d gate of each example, [S, U].
        fixed: Units that stay.

    Returns:
        A mask that keeps as many.
    """
    vectors = gradients.double().T.contiguous()  # [U, S]
    removed = ~mask.to(vectors.device)
    norms = vectors.square().sum(1)
    ranked = [unit for unit in norms.argsort(stable=True).tolist() if unit not in fixed]
    total = vectors[removed].sum(0)
    for _ in range(MAX_PASSES):
        before = removed.clone()
        for unit in ranked:
            if removed[unit] or not removed.any():
                continue
            # Without unit i, what is removed would have the norm ||t - g_i||^2 = ||t||^2 - 2 t g_i + ||g_i||^2.
            with_unit = total + vectors[unit]
            change = (norms - 2 * vectors @ with_unit).masked_fill(~removed, float("inf"))
            back = int(change.argmin())
            new = with_unit - vectors[back]
            if float(new.square().sum()) < float(total.square().sum()) * (1 - 1e-9):
                removed[unit], removed[back], total = True, False, new
        if torch.equal(before, removed):
            break
    return (~removed).to(mask.device)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A layer that reads the units of a group, before and after pruning."""

    weight: Tensor
    """[O, I]."""

    index: Tensor
    """Inputs that each unit owns, [U, K]."""

    gram: Tensor
    """Sum of x x^T over tokens, x the layer's input in the pruned model, all units of the layer included, [I, I]."""

    cross: Tensor
    """Sum of y x^T over tokens, y the layer's input in the dense model, [I, I]."""


def tune_scales(mask: Tensor, layers: list[Reconstruction], damping: float = 0.01) -> Tensor:
    """Scale the kept units so that the layer's outputs come as close to the dense model's as possible.

    Minimizes ``||W y - W (s * x)||^2 + damping * mean(diag A) * ||s - 1||^2`` over the scales s of the kept units, A
    being the matrix of the normal equations. Unlike in the paper (section 3.3), the error of the residual stream that a
    layer is added to is not part of its target: a layer makes up for its own units.

    Args:
        mask: Bool [U], True = keep.
        layers: Everything that reads the units.
        damping: Relative damping > 0; pulls scales towards 1.

    Returns:
        Scales [U] in float64, 0 where units are removed; 1 for all that are kept if any scale would exceed 10.
    """
    count = len(mask)
    products = torch.zeros(count, count, dtype=torch.float64)
    targets = torch.zeros(count, dtype=torch.float64)
    for layer in layers:
        weight = layer.weight.double()
        outer = weight.T @ weight  # [I, I]
        products += _between_units(outer * layer.gram.double(), layer.index).cpu()
        targets += (outer * layer.cross.double()).sum(0)[layer.index.to(outer.device)].sum(1).cpu()
    scales = mask.double().cpu()
    kept = mask.cpu().nonzero().flatten()
    if len(kept):
        matrix = products[kept][:, kept]
        damped = matrix + damping * matrix.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
        change, failed = torch.linalg.solve_ex(damped, targets[kept] - matrix.sum(1))
        tuned = 1 + change
        if not int(failed) and bool((tuned.abs() <= MAX_SCALE).all()):
            scales[kept] = tuned
    return scales


def _between_units(matrix: Tensor, index: Tensor) -> Tensor:
    """Sum the blocks of a matrix [I, I] that belong to pairs of units, [U, U]."""
    index = index.to(matrix.device)
    rows = matrix[index].sum(1)  # [U, I]
    return rows[:, index].sum(2)
