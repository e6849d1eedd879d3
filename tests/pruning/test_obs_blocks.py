"""Rows, columns and blocks that go as a whole, against least squares and brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_compress.pruning.obs import inverse_hessian
from hf_compress.pruning.obs_blocks import BlockSurgeon

OUTPUTS, INPUTS = 5, 7
BLOCKS = {"row": (1, INPUTS), "column": (OUTPUTS, 1), "block": (2, 3), "larger": (32, 32)}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs [tokens, inputs], a weight, and the inverse Hessian without damping."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x = torch.randn(64, INPUTS, generator=generator, dtype=torch.float64) @ mix
    return x, torch.randn(OUTPUTS, INPUTS, generator=generator).double(), inverse_hessian(x.T @ x, 0.0)


def tiles(block: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of every block."""
    high, wide = block
    return [
        (slice(i, min(i + high, OUTPUTS)), slice(j, min(j + wide, INPUTS)))
        for i in range(0, OUTPUTS, high)
        for j in range(0, INPUTS, wide)
    ]


def refitted(x: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The weight with zeros where ``keep`` [outputs, inputs] is False that comes closest to the outputs."""
    result = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        if kept.any():
            result[row, kept] = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
    return result


def error(x: Tensor, weight: Tensor, keep: Tensor) -> float:
    return float((x @ (refitted(x, weight, keep) - weight).T).square().sum())


def keeping(gone: list[int], block: tuple[int, int]) -> Tensor:
    keep = torch.ones(OUTPUTS, INPUTS, dtype=torch.bool)
    for number in gone:
        keep[tiles(block)[number]] = False
    return keep


@pytest.mark.parametrize("granularity", BLOCKS)
def test_what_stays_is_the_least_squares_solution(granularity: str) -> None:
    x, weight, inverse = problem()
    block = BLOCKS[granularity]
    count = len(tiles(block))
    for gone in ([], [0], [count - 1], list(range(0, count, 2)), list(range(count))):
        keep = torch.ones(count, dtype=torch.bool)
        keep[gone] = False
        changed = BlockSurgeon(weight, inverse, block).without(keep)
        expected = refitted(x, weight, keeping(gone, block))
        torch.testing.assert_close(changed, expected, rtol=1e-6, atol=1e-8)
        assert not changed[~keeping(gone, block)].any()


@pytest.mark.parametrize("granularity", BLOCKS)
def test_losses_are_what_the_best_next_block_of_a_band_adds(granularity: str) -> None:
    x, weight, inverse = problem()
    block = BLOCKS[granularity]
    losses = BlockSurgeon(weight, inverse, block).losses()
    bands = {}
    for number, (rows, _) in enumerate(tiles(block)):
        bands.setdefault(rows.start, []).append(number)
    expected = torch.zeros(len(tiles(block)), dtype=torch.float64)
    for band in bands.values():
        gone: list[int] = []
        before = highest = 0.0
        while len(gone) < len(band):
            left = {each: error(x, weight, keeping([*gone, each], block)) for each in band if each not in gone}
            best = min(left, key=left.__getitem__)
            highest = max(highest, left[best] - before)
            expected[best] = highest
            before = left[best]
            gone.append(best)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-8)


def test_single_weights_cost_what_each_alone_would() -> None:
    x, weight, inverse = problem()
    losses = BlockSurgeon(weight, inverse, (1, 1)).losses().view(OUTPUTS, INPUTS)
    for i, j in itertools.product(range(OUTPUTS), range(INPUTS)):
        keep = torch.ones(OUTPUTS, INPUTS, dtype=torch.bool)
        keep[i, j] = False
        assert float(losses[i, j]) == pytest.approx(error(x, weight, keep), rel=1e-6)


def test_the_dtype_stays() -> None:
    _, weight, inverse = problem()
    keep = torch.tensor([True] * 6 + [False])
    assert BlockSurgeon(weight.bfloat16(), inverse, BLOCKS["column"]).without(keep).dtype == torch.bfloat16
