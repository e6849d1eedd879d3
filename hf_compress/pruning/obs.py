"""Optimal brain surgeon: what is removed is made up for, as well as possible, by what stays in the same layer.

For a layer ``y = W x`` the squared output error of a change D of its weight is ``tr(D H D^T)`` with the Hessian
``H = sum x x^T`` over calibration tokens. Everything here is exact for that quadratic; tensors in, tensors out.

Letters in shapes: O outputs, I inputs, U units, K inputs per unit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import TargetError

BLOCK_SIZE = 128
"""Columns of a weight that are updated at once before the error goes on to the rest; SparseGPT's default."""

COMPACT_BELOW = 0.8
"""Matrices are made smaller when less than this share of their columns is left."""


def inverse_hessian(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Return ``(H + damping * mean(diag H) * 1)^-1``.

    Args:
        gram: H = sum of x x^T over tokens, [I, I].
        damping: Relative damping >= 0; inputs that are never used, or always together, need some.

    Returns:
        The symmetric inverse in float64, [I, I].

    Raises:
        TargetError: If H is not finite, or singular in spite of the damping.
    """
    hessian = gram.double()
    if not bool(torch.isfinite(hessian).all()):
        raise TargetError("inverse_hessian: the inputs' second moments are not finite; check the calibration data.")
    scale = hessian.diagonal().mean()
    damped = hessian + damping * scale * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise TargetError(
            f"inverse_hessian: the second moments of {len(hessian)} inputs are singular with damping={damping}. Are "
            "the inputs zero? Give more calibration data, or more damping (0.01 to 0.1)."
        )
    return torch.cholesky_inverse(factor)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads all units of a group."""

    weight: Tensor
    """[O, I]."""

    inverse: Tensor
    """``inverse_hessian`` of its inputs, [I, I], float64."""

    index: Tensor
    """Inputs that each unit owns, [U, K]."""


@dataclass(frozen=True, eq=False)
class Removal:
    """In which order units go, and what that costs."""

    order: Tensor
    """Units, the first to go first, [removed]."""

    errors: Tensor
    """Squared output error of all consumers once 0, 1, 2, ... units are gone, [removed + 1], float64."""


def removal_order(consumers: Sequence[Consumer], count: int, fixed: Collection[int] = ()) -> Removal:
    """Remove one unit after the other, each time the one whose loss the remaining inputs can best make up for.

    Unit S costs ``tr(W_S [(H^-1)_SS]^-1 W_S^T)``, summed over the consumers. When it goes,
    ``W -= W_S [(H^-1)_SS]^-1 (H^-1)_S`` and ``H^-1 -= (H^-1)_S^T [(H^-1)_SS]^-1 (H^-1)_S``. The weights after any
    number of removals follow from ``without_units``.

    Source: ZipLM, Kurtic et al. 2023, arXiv:2302.04089, section 3.1 and algorithm 1.

    Args:
        consumers: The layers that read the units.
        count: Number of units to remove.
        fixed: Units that stay.
    """
    layers = [_Running(each) for each in consumers]
    gone = torch.zeros(len(consumers[0].index), dtype=torch.bool, device=consumers[0].weight.device)
    stays = gone.clone()
    stays[list(fixed)] = True
    order, errors = [], [0.0]
    for _ in range(count):
        scores = sum(layer.scores(gone) for layer in layers)
        assert isinstance(scores, Tensor)
        unit = int(scores.masked_fill(gone | stays, float("inf")).argmin())
        order.append(unit)
        errors.append(errors[-1] + float(scores[unit]))
        for layer in layers:
            layer.remove(unit)
        gone[unit] = True
    return Removal(torch.tensor(order, dtype=torch.long), torch.tensor(errors, dtype=torch.float64))


class _Running:
    """Weight and inverse Hessian of one consumer while units go."""

    def __init__(self, consumer: Consumer) -> None:
        self.weight = consumer.weight.double().clone()
        self.inverse = consumer.inverse.double().clone()
        self.index = consumer.index.to(self.weight.device)
        self.left = torch.ones(len(self.inverse), dtype=torch.bool, device=self.weight.device)

    def scores(self, gone: Tensor) -> Tensor:
        """Return what each unit would cost, [U]; meaningless for units that are gone."""
        if self.index.shape[1] == 1:
            columns = self.index[:, 0]
            divisors: Tensor = self.inverse.diagonal()[columns].masked_fill(gone, 1.0)
            return self.weight.square().sum(0)[columns] / divisors
        weights = self.weight[:, self.index].permute(1, 2, 0)  # [U, K, O]
        blocks = self.inverse[self.index[:, :, None], self.index[:, None, :]]  # [U, K, K]
        blocks[gone] = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        solved: Tensor = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum((1, 2))

    def remove(self, unit: int) -> None:
        columns = self.index[unit]
        rows = self.inverse[columns]  # [K, I]
        share = torch.linalg.solve(rows[:, columns], rows)
        self.weight.addmm_(self.weight[:, columns], share, alpha=-1)
        self.inverse.addmm_(rows.T, share, alpha=-1)
        # Exactly zero, where rounding leaves something that later steps would take for a weight.
        self.weight[:, columns] = 0.0
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0
        self.left[columns] = False
        if int(self.left.sum()) < COMPACT_BELOW * len(self.left):
            self._drop_zeros()

    def _drop_zeros(self) -> None:
        """Go on without the columns that are gone: each step costs as much as the matrices are large."""
        self.weight = self.weight[:, self.left]
        self.inverse = self.inverse[self.left][:, self.left]
        place = self.left.cumsum(0) - 1
        self.index = place[self.index].clamp_min(0)  # of units that are gone, whose scores are not looked at, anywhere
        self.left = self.left[self.left]


def without_units(consumer: Consumer, units: Tensor) -> Tensor:
    """Return the consumer's weight once ``units`` are gone: the least-squares solution over the inputs that stay.

    Args:
        consumer: The layer.
        units: The units that go, in any order, [removed].

    Returns:
        [O, I] in the dtype of the weight; exactly zero where units are gone.
    """
    weight, inverse = consumer.weight.double(), consumer.inverse.double()
    columns = consumer.index[units.to(consumer.index.device)].flatten().to(weight.device)
    rows = inverse[columns]
    changed = weight - weight[:, columns] @ torch.linalg.solve(rows[:, columns], rows)
    changed[:, columns] = 0.0
    result: Tensor = changed.to(consumer.weight.dtype)
    return result


def sparsegpt(
    weight: Tensor,
    inverse: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Remove single weights column by column; the columns to the right make up for each.

    Row i loses w_ij where ``w_ij^2 / [H_F^-1]_jj`` is least, F the columns from j on; its rest changes by
    ``-w_ij / [H_F^-1]_jj * [H_F^-1]_j``. The rows of the upper Cholesky factor of H^-1 are these rows of H_F^-1,
    divided by the square root of their first element.

    Source: SparseGPT, Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1 and section 3.3.

    Args:
        weight: [O, I].
        inverse: ``inverse_hessian`` of the inputs, [I, I].
        sparsity: Fraction of the weights to remove, the lowest scores of each block of columns.
        pattern: (n, m) instead: every row keeps n of every m neighbouring inputs. I must be a multiple of m.
        block_size: Columns whose errors go on to later blocks together; with ``sparsity``, scores compete within one.

    Returns:
        The new weight [O, I] in its dtype, and its mask, True = keep.

    Raises:
        TargetError: If the pattern does not fit the weight.
    """
    if (sparsity is None) == (pattern is None):
        raise TargetError(f"sparsegpt: got sparsity={sparsity} and pattern={pattern}; pass exactly one of them.")
    if pattern is not None:
        block_size = _check_pattern(weight, pattern, block_size)
    factor = torch.linalg.cholesky(inverse.double(), upper=True)
    result = weight.double().clone()
    keep = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        block = slice(start, stop)
        if sparsity is not None:
            # Rounding is made up for in the next block, so that the whole comes out right.
            goal = round(sparsity * keep[:, :stop].numel()) - int((~keep[:, :start]).sum())
            keep[:, block] = _without_lowest(_scores(result[:, block], factor[block, block]), goal)
        errors = _prune_columns(result[:, block], keep[:, block], factor[block, block], pattern)
        result[:, stop:] -= errors @ factor[block, stop:]
    return result.masked_fill(~keep, 0.0).to(weight.dtype), keep


def keep_best_of_each(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Return a mask that keeps the n highest of every m neighbouring scores in a row.

    Args:
        scores: [O, I], I a multiple of m.
        pattern: (n, m).

    Returns:
        Bool [O, I], True = keep.
    """
    kept, size = pattern
    groups = scores.reshape(scores.shape[0], -1, size)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(scores.shape)


def _prune_columns(weight: Tensor, keep: Tensor, factor: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Remove what is masked from one block of columns, in place, [O, B]; return the errors, [O, B]."""
    errors = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if pattern is not None and j % pattern[1] == 0:  # chosen when its turn comes: earlier errors have arrived
            few = slice(j, j + pattern[1])
            keep[:, few] = keep_best_of_each(_scores(weight[:, few], factor[few, few]), pattern)
        errors[:, j] = weight[:, j].masked_fill(keep[:, j], 0.0) / factor[j, j]
        weight[:, j:] -= errors[:, j, None] * factor[j, j:]
    return errors


def _scores(weight: Tensor, factor: Tensor) -> Tensor:
    return weight.square() / factor.diagonal().square()


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[:count]] = False
    return keep.view(scores.shape)


def _check_pattern(weight: Tensor, pattern: tuple[int, int], block_size: int) -> int:
    """Return a block size that cuts no group of the pattern."""
    kept, size = pattern
    if not 0 < kept < size or weight.shape[1] % size:
        raise TargetError(
            f"sparsegpt: pattern {kept}:{size} for a weight with {weight.shape[1]} inputs; allowed: n:m with "
            "0 < n < m, and a number of inputs that is a multiple of m. Exclude this layer."
        )
    return max(block_size // size, 1) * size
