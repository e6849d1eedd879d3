import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.quantization.clipping import entropy_range, extremes, mse_range
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.observers import Entropy, Mse


def heavy_tails(rows: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, count, generator=generator)
    return x * torch.rand(rows, count, generator=generator).reciprocal().clamp_max(50) ** 0.5


def rounding_error(values: np.ndarray, low: float, high: float, grid: Grid) -> float:
    """Mean of squares from the definition, in double precision."""
    low, high = min(low, 0.0), max(high, 0.0)
    if grid.symmetric:
        scale = max(-low, high) / ((grid.high - grid.low) / 2) if grid.signed else high / grid.high
        zero_point = 0.0
    else:
        scale = (high - low) / (grid.high - grid.low)
        zero_point = grid.low - np.round(low / scale)
    integers = np.clip(np.round(values / scale) + zero_point, grid.low, grid.high)
    return float(np.mean(((integers - zero_point) * scale - values) ** 2))


def test_extremes_of_what_is_kept() -> None:
    x = torch.tensor([[1.0, -5.0, 3.0], [2.0, 7.0, 9.0]])
    low, high = extremes(x)
    assert (low.tolist(), high.tolist()) == ([-5.0, 2.0], [3.0, 9.0])
    low, high = extremes(x, torch.tensor([[True, False, True], [False, False, False]]))
    assert (low.tolist(), high.tolist()) == ([1.0, torch.inf], [3.0, -torch.inf])


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["full", "restricted", "unsigned"])
def test_the_symmetric_search_finds_the_best_of_its_candidates(num_bits: int, kind: str) -> None:
    grid = Grid(num_bits=num_bits, restricted=kind == "restricted", signed=kind != "unsigned")
    x = heavy_tails(3, 400)
    x = x if grid.signed else x.abs()
    low, high = mse_range(x, None, grid, extremes(x), num_candidates=50)
    for i, row in enumerate(x.double().numpy()):
        largest = np.abs(row).max()
        errors = [rounding_error(row, -largest * k / 50 * grid.signed, largest * k / 50, grid) for k in range(1, 51)]
        assert high[i].item() == pytest.approx(largest * (np.argmin(errors) + 1) / 50, rel=1e-5)
        assert low[i].item() == (-high[i].item() if grid.signed else 0.0)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_affine_search_comes_close_to_the_best_pair_of_ends(num_bits: int) -> None:
    grid = Grid(num_bits=num_bits, symmetric=False)
    x = heavy_tails(3, 300, seed=1) + 0.7
    limits = extremes(x)
    low, high = mse_range(x, None, grid, limits, num_candidates=40)
    for i, row in enumerate(x.double().numpy()):
        found = rounding_error(row, low[i].item(), high[i].item(), grid)
        shares = [k / 20 for k in range(1, 21)]
        ends = [end[i].item() for end in limits]
        best = min(rounding_error(row, ends[0] * a, ends[1] * b, grid) for a, b in itertools.product(shares, shares))
        assert found <= rounding_error(row, *ends, grid)
        assert found <= 1.1 * best


def test_counts_are_as_good_as_repetitions() -> None:
    grid = Grid(num_bits=3)
    x = heavy_tails(2, 40)
    counts = torch.randint(0, 4, x.shape, generator=torch.Generator().manual_seed(0))
    repeated = [row.repeat_interleave(times)[None] for row, times in zip(x, counts, strict=True)]
    together = mse_range(x, counts, grid, extremes(x))
    for i, row in enumerate(repeated):
        alone = mse_range(row, None, grid, tuple(end[i : i + 1] for end in extremes(x)))
        assert alone[1].item() == pytest.approx(together[1][i].item())


@pytest.mark.parametrize("num_bits", [4, 8])
def test_the_histogram_loses_next_to_nothing_against_the_values_themselves(num_bits: int) -> None:
    grid = Grid(num_bits=num_bits)
    x = heavy_tails(1, 5000)
    observer = Mse(grid)
    observer.observe(x)
    row = x[0].double().numpy()
    exact = rounding_error(row, *(end.item() for end in mse_range(x, None, grid, extremes(x))), grid)
    assert rounding_error(row, *(end.item() for end in observer.range()), grid) <= 1.05 * exact


def divergence(counts: list[float], kept: int, levels: int) -> float:
    """KL divergence of one threshold, bin by bin, as in the slides on TensorRT."""
    reference = counts[:kept]
    reference[-1] += sum(counts[kept:])
    quantized = [0.0] * kept
    for level in range(levels):
        members = [j for j in range(kept) if j * levels // kept == level]
        filled = [j for j in members if counts[j] > 0]
        for j in filled:
            quantized[j] = sum(counts[m] for m in members) / len(filled)
    if reference[-1] > 0 and quantized[-1] == 0:
        quantized[-1] = 1e-4
    total, total_quantized = sum(reference), sum(quantized)
    result = 0.0
    for p, q in zip(reference, quantized, strict=True):
        if p > 0:
            result += p / total * np.log(p / total / (q / total_quantized))
    return result


@pytest.mark.parametrize("num_bits", [3, 4])
def test_the_entropy_search_finds_the_threshold_of_the_slides(num_bits: int) -> None:
    grid = Grid(num_bits=num_bits, restricted=True)
    x = heavy_tails(3, 600, seed=2)
    for i, row in enumerate(x):
        observer = Entropy(grid, num_bins=256, num_candidates=128)
        observer.observe(row)
        end = 2.0 ** np.ceil(np.log2(row.abs().max().item()))
        counts = np.histogram(row.abs().numpy(), bins=128, range=(0, end))[0].astype(float)
        levels = 2 ** (num_bits - 1)
        candidates = sorted({levels + (128 - levels) * k // 128 for k in range(129)})
        found = [divergence(list(counts), kept, levels) for kept in candidates]
        expected = min(candidates[int(np.argmin(found))] * end / 128, row.abs().max().item())
        low, high = observer.range()
        assert (high.item(), low.item()) == (pytest.approx(expected), pytest.approx(-expected)), i
        assert high.item() < row.abs().max().item()


def test_the_entropy_search_clips_outliers_and_stays_inside_the_limits() -> None:
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)).abs()
    x[0, :3] = 60.0
    for grid in (Grid(), Grid(symmetric=False), Grid(signed=False)):
        observer = Entropy(grid)
        observer.observe(x)
        low, high = (end.item() for end in observer.range())
        assert 2.0 < high < 30.0
        assert low == (-high if grid.symmetric and grid.signed else pytest.approx(x.min().item()))
    limits = (x.amin(1), x.amax(1))
    assert entropy_range(observer.histogram(), Grid(), limits, num_candidates=1)[1].item() <= 60.0
