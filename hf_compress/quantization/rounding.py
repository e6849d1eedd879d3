"""Weight-only rounding that makes up for each column's error in the columns that are still to come.

For a layer ``y = W x`` the squared output error of a change D of its weight is ``tr(D H D^T)`` with the Hessian
``H = sum x x^T`` over calibration tokens. Letters in shapes: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.quantization.clipping import Range, extremes
from hf_compress.quantization.fake import to_integers, to_values
from hf_compress.quantization.granularity import per_group
from hf_compress.quantization.grid import Grid

Choose = Callable[[Tensor], Range]
"""From blocks of weights, [blocks, values], to the low and high ends of their ranges, [blocks] each."""


class RoundedWeight(NamedTuple):
    """A weight on a grid."""

    integers: Tensor
    """int8 or uint8 [O, I]."""

    scale: Tensor
    """float32 [O, G]; G = 1 without groups. Group k holds the inputs k * group_size and on."""

    zero_point: Tensor | None
    """int32 [O, G]; None if the grid is symmetric."""

    weight: Tensor
    """(integers - zero_point) * scale, [O, I] in the dtype of the weight that was rounded."""

    error: Tensor
    """Squared output error of each row, d H d^T with the damped H, float64 [O]."""


@torch.no_grad()
def round_to_nearest(weight: Tensor, grid: Grid, *, group_size: int = 0, choose: Choose = extremes) -> RoundedWeight:
    """Round each weight by itself; ``error`` is the squared change, as if H were the identity.

    Args:
        weight: [O, I]; columns of removed inputs must be zero, or they influence the ranges.
        grid: The format.
        group_size: Inputs that share a step; 0 = all of a row.
        choose: Ranges.

    Raises:
        TargetError: If groups do not divide the inputs.
    """
    steps = _steps(weight, grid, group_size or weight.shape[1], choose)
    integers = _integers(weight, grid, steps)
    error = (_values(integers, steps) - weight.double()).square().sum(1)
    return _result(weight, integers, steps, error)


@torch.no_grad()
def gptq(
    weight: Tensor,
    inverse: Tensor,
    grid: Grid,
    *,
    group_size: int = 0,
    order: Tensor | None = None,
    choose: Choose = extremes,
    block_size: int = 128,
) -> RoundedWeight:
    """Round column by column; the columns that follow take each error over, as optimal brain surgeon has it.

    When column j is rounded, the rest F of its row changes by ``-(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_j``. The rows of
    the upper Cholesky factor of H^-1 are these rows of H_F^-1, divided by the square root of their first element. A row
    where plain rounding has the lower output error (the ends of the grid can bring that about) is rounded plainly, so
    the result is never worse.

    Source: GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1 and section 3.3.

    Args:
        weight: [O, I]; columns of removed inputs must be zero.
        inverse: The inverse of the damped Hessian, ``(H + damping * mean(diag H) * 1)^-1``, [I, I], as
            ``hf_compress.pruning.obs.inverse_hessian`` returns it.
        grid: The format.
        group_size: Inputs that share a step; 0 = all of a row. Without ``order`` a group's range is chosen when its
            turn comes, from weights that have taken earlier errors over; with it, from the original weights, so that
            groups stay neighbors.
        order: Columns in the order in which to round them, a permutation of I indices, e.g. ``activation_order``;
            None = from left to right.
        choose: Ranges, e.g. ``functools.partial(mse_range, ...)``; the extremes of the weights if not given.
        block_size: Columns whose errors go on to later blocks together; changes the speed alone.

    Raises:
        TargetError: If groups do not divide the inputs, or ``inverse`` is not positive definite.
    """
    size = group_size or weight.shape[1]
    permuted = torch.arange(weight.shape[1], device=weight.device) if order is None else order.to(weight.device)
    factor = _factor(inverse.double()[permuted][:, permuted])
    plain = round_to_nearest(weight, grid, group_size=group_size, choose=choose)
    steps = _Steps(plain.scale, plain.zero_point)
    rounded, steps = _round_columns(
        weight.double().T[permuted].contiguous(),
        factor,
        grid,
        steps,
        [index // size for index in permuted.tolist()],
        choose if order is None and group_size else None,
        max(block_size // size, 1) * size if group_size else block_size,
    )
    integers = torch.empty_like(plain.integers)
    integers[:, permuted] = rounded.T
    fed_forward = _result(weight, integers, steps, torch.zeros_like(plain.error))
    changes = [(_values(each.integers, each) - weight.double())[:, permuted] for each in (plain, fed_forward)]
    errors = [torch.linalg.solve_triangular(factor.T, change.T, upper=False).square().sum(0) for change in changes]
    return _rows_of(errors[0] < errors[1], plain._replace(error=errors[0]), fed_forward._replace(error=errors[1]))


def activation_order(gram: Tensor) -> Tensor:
    """Return the inputs by falling second moment, as "act-order" rounds them: what matters most first.

    Args:
        gram: H = sum of x x^T over tokens, [I, I].

    Returns:
        int64 [I].
    """
    return gram.diagonal().argsort(descending=True, stable=True)


class _Steps(NamedTuple):
    scale: Tensor
    zero_point: Tensor | None


def _round_columns(
    columns: Tensor,
    factor: Tensor,
    grid: Grid,
    steps: _Steps,
    groups: list[int],
    choose: Choose | None,
    block_size: int,
) -> tuple[Tensor, _Steps]:
    """Round the columns of a weight in their order; changes them.

    They lie along the first dimension here: contiguous in memory, they are updated twice as fast.

    Args:
        columns: float64 [I, O].
        factor: Upper Cholesky factor of H^-1, same order.
        grid: The format.
        steps: Of the original weight, [O, G].
        groups: Of each column, I of them.
        choose: Chooses the step of a group when its first column comes; None = ``steps`` stay.
        block_size: A multiple of the group's size, where ``choose`` is given.

    Returns:
        Integers [I, O], and the steps that were used, [O, G].
    """
    scale = steps.scale.T.contiguous()
    zero_point = None if steps.zero_point is None else steps.zero_point.T.contiguous()
    integers = torch.empty_like(columns, dtype=grid.dtype)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        errors = torch.zeros_like(columns[start:stop])
        for j in range(start, stop):
            k = groups[j]
            if choose is not None and (j == 0 or groups[j - 1] != k):
                group = columns[j : j + groups.count(k)].T
                fresh = _steps(group, grid, group.shape[1], choose)
                scale[k] = fresh.scale[:, 0]
                if zero_point is not None and fresh.zero_point is not None:
                    zero_point[k] = fresh.zero_point[:, 0]
            here = _Steps(scale[k], None if zero_point is None else zero_point[k])
            # In float32, as plain rounding does: the end of a symmetric range is a tie.
            integers[j] = to_integers(columns[j].to(torch.float32), grid, *here)
            errors[j - start] = (columns[j] - to_values(integers[j], *here, torch.float64)) / factor[j, j]
            columns[j:stop].addcmul_(factor[j, j:stop, None], errors[j - start], value=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return integers, _Steps(scale.T.contiguous(), None if zero_point is None else zero_point.T.contiguous())


def _factor(inverse: Tensor) -> Tensor:
    """Return the upper Cholesky factor U, H^-1 = U^T U."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed):
        raise TargetError(
            f"gptq: the inverse Hessian of {len(inverse)} inputs is not positive definite. Invert it with damping "
            "(0.01 to 0.1 of the mean of its diagonal), or give more calibration data."
        )
    return factor


def _steps(weight: Tensor, grid: Grid, size: int, choose: Choose) -> _Steps:
    """Return steps and zero points, [O, I / size] each."""
    scale, zero_point = grid.parameters(*choose(per_group(size).blocks(weight.to(torch.float32))))
    shape = (len(weight), -1)
    return _Steps(scale.view(shape), None if zero_point is None else zero_point.view(shape))


def _spread(steps: _Steps | RoundedWeight) -> tuple[Tensor, Tensor | None]:
    return steps.scale[..., None], None if steps.zero_point is None else steps.zero_point[..., None]


def _integers(weight: Tensor, grid: Grid, steps: _Steps) -> Tensor:
    granularity = per_group(weight.shape[1] // steps.scale.shape[1])
    return granularity.restore(to_integers(granularity.view(weight), grid, *_spread(steps)))


def _values(integers: Tensor, steps: _Steps | RoundedWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    granularity = per_group(integers.shape[1] // steps.scale.shape[1])
    return granularity.restore(to_values(granularity.view(integers), *_spread(steps), dtype))


def _result(weight: Tensor, integers: Tensor, steps: _Steps, error: Tensor) -> RoundedWeight:
    return RoundedWeight(integers, *steps, _values(integers, steps, weight.dtype), error)


def _rows_of(first: Tensor, one: RoundedWeight, other: RoundedWeight) -> RoundedWeight:
    """Return the rows of one where ``first``, [O], else those of the other."""
    rows = first[:, None]
    zero_point = other.zero_point
    if one.zero_point is not None and zero_point is not None:
        zero_point = torch.where(rows, one.zero_point, zero_point)
    return RoundedWeight(
        torch.where(rows, one.integers, other.integers),
        torch.where(rows, one.scale, other.scale),
        zero_point,
        torch.where(rows, one.weight, other.weight),
        torch.where(first, one.error, other.error),
    )
