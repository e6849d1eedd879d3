import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.quantization.clipping import extremes
from hf_compress.quantization.fake import to_integers, to_values
from hf_compress.quantization.granularity import PER_TENSOR, per_channel, per_group
from hf_compress.quantization.grid import EPS, Grid
from hf_compress.quantization.histogram import histogram_of
from hf_compress.quantization.lsq import counted_step_and_offset, gradient_scale, initial_step, learned_step

GRIDS = [Grid(num_bits=2), Grid(num_bits=4), Grid(num_bits=3, signed=False), Grid(restricted=True)]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_the_paper(v: float, s: float, b: float, grid: Grid) -> tuple[float, float, float, float]:
    """The value, and its derivatives with respect to v, s and b: equations 1 to 3 and 5."""
    ratio = (v - b) / s
    if ratio <= grid.low:
        return grid.low * s + b, 0.0, grid.low, 1.0
    if ratio >= grid.high:
        return grid.high * s + b, 0.0, grid.high, 1.0
    return np.round(ratio) * s + b, 1.0, np.round(ratio) - ratio, 0.0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(0), per_channel(-1), per_group(3)], ids=str)
def test_value_and_gradients_are_the_papers(grid: Grid, with_offset: bool, granularity) -> None:
    x, upstream = values(4, 6), values(4, 6, seed=1)
    count = granularity.num_blocks(x.shape)
    step = (values(count, seed=2).abs() * 0.5 + 0.2) * 3 / grid.high
    offset = values(count, seed=3) * 0.3 if with_offset else None
    leaves = [leaf.requires_grad_() for leaf in (x, step, offset) if leaf is not None]
    spread = [None if each is None else granularity.spread(each, x.shape) for each in (step, offset)]
    result = granularity.restore(learned_step(granularity.view(x), grid, *spread, gradient_scale=0.25))
    result.backward(upstream)
    owner = granularity.spread(torch.arange(count), x.shape).expand_as(granularity.view(x)).reshape(x.shape)
    expected = [np.zeros(x.shape), np.zeros(count), np.zeros(count)]
    for i in range(4):
        for j in range(6):
            k = int(owner[i, j])
            b = 0.0 if offset is None else offset[k].item()
            value, for_x, for_step, for_offset = by_the_paper(x[i, j].item(), step[k].item(), b, grid)
            assert result[i, j].item() == pytest.approx(value, abs=1e-6)
            g = upstream[i, j].item()
            expected[0][i, j] = g * for_x
            expected[1][k] += 0.25 * g * for_step
            expected[2][k] += 0.25 * g * for_offset
    for leaf, wanted in zip(leaves, expected, strict=False):
        np.testing.assert_allclose(leaf.grad.numpy(), wanted, atol=1e-5)
    assert 0 < np.count_nonzero(expected[0]) < expected[0].size or grid.num_bits == 8


def test_it_agrees_with_torchs_own_learnable_kernel() -> None:
    grid = Grid(num_bits=4)
    x, upstream = values(5, 40), values(5, 40, seed=1)
    results = []
    for mine in (True, False):
        leaf, step = x.clone().requires_grad_(), torch.full((5,), 0.15, requires_grad=True)
        ratio = leaf.detach() / 0.15
        # The kernel goes by the rounded value, the paper by the exact one: they differ in half a step at the ends.
        clear = (ratio - grid.low).abs().gt(0.51) & (ratio - grid.high).abs().gt(0.51)
        if mine:
            result = learned_step(leaf, grid, step[:, None], gradient_scale=0.5)
        else:
            zeros = torch.zeros(5)
            result = torch._fake_quantize_learnable_per_channel_affine(leaf, step, zeros, 0, grid.low, grid.high, 0.5)
        (result * upstream * clear).sum().backward()
        results.append((result.detach() * clear, leaf.grad, step.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_steps_that_are_learned_are_those_that_are_exported() -> None:
    x, grid = values(6, 50), Grid(num_bits=4)
    step = initial_step(x, grid)[:, None]
    assert torch.equal(learned_step(x, grid, step), to_values(to_integers(x, grid, step), step))


def test_the_first_step_and_the_gradient_scale_are_the_papers() -> None:
    x, grid = values(3, 40), Grid(num_bits=4)
    expected = 2 * np.abs(x.numpy()).mean(1) / np.sqrt(7)
    np.testing.assert_allclose(initial_step(x, grid).numpy(), expected, rtol=1e-6)
    keep = torch.arange(40) < 30
    masked = initial_step(x, grid, keep.expand_as(x))
    np.testing.assert_allclose(masked.numpy(), 2 * np.abs(x.numpy()[:, :30]).mean(1) / np.sqrt(7), rtol=1e-6)
    assert initial_step(torch.zeros(2, 3), grid).tolist() == [pytest.approx(EPS)] * 2
    assert gradient_scale(120, grid) == pytest.approx(1 / np.sqrt(120 * 7))
    assert gradient_scale(50, Grid(num_bits=4, signed=False)) == pytest.approx(1 / np.sqrt(50 * 15))
    with pytest.raises(ConfigError, match="numel=0"):
        gradient_scale(0, grid)


def step_and_offset(x: torch.Tensor, grid: Grid, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    return counted_step_and_offset(histogram_of(x, keep, 4096), extremes(x, keep), grid)


@pytest.mark.parametrize("num_bits", [2, 4])
def test_the_first_offset_suits_skewed_values(num_bits: int) -> None:
    grid = Grid(num_bits=num_bits)
    x = torch.nn.functional.silu(values(2, 400) * 2)  # one long side
    step, offset = step_and_offset(x, grid)
    fitted = learned_step(x, grid, step[:, None], offset[:, None])
    ends = itertools.product(np.linspace(-0.4, 0.4, 17), np.linspace(1.0, x.max().item(), 25))
    lines = [(low, (high - low) / (2**num_bits - 1)) for low, high in ends]
    for row, found in zip(x.numpy(), fitted.numpy(), strict=True):
        errors = [np.mean((np.round((row - b) / s).clip(0, 2**num_bits - 1) * s + b - row) ** 2) for b, s in lines]
        assert np.mean((found - row) ** 2) < 1.05 * min(errors)
    symmetric = learned_step(x, grid, initial_step(x, grid)[:, None])
    assert ((fitted - x) ** 2).mean() < 0.7 * ((symmetric - x) ** 2).mean()
    for low, high in zip(x.amin(1), x.amax(1), strict=True):  # plain asymmetric rounding of the full range
        scale = (high - low) / (2**num_bits - 1)
        plain = ((x - low) / scale).round() * scale + low
        assert ((fitted - x) ** 2).mean() < ((plain - x) ** 2).mean()
    keep = torch.arange(400).expand(2, 400) < 300
    kept = step_and_offset(x[:, :300], grid)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(step_and_offset(x, grid, keep), kept, strict=True))


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_first_offset_of_many_values_is_as_good(num_bits: int) -> None:
    grid, x = Grid(num_bits=num_bits), torch.nn.functional.silu(values(1, 30_000) * 2)
    step, offset = step_and_offset(x, grid)
    error = ((learned_step(x, grid, step[:, None], offset[:, None]) - x) ** 2).mean()
    ends = itertools.product(np.linspace(-0.3, -0.1, 9), x.max().item() * np.linspace(0.3, 1.0, 15))
    errors = []
    for low, high in ends:
        scale = (high - low) / (2**num_bits - 1)
        errors.append((((x - low) / scale).round().clamp(0, 2**num_bits - 1) * scale + low - x).square().mean())
    assert error < 1.05 * min(errors)


@pytest.mark.parametrize("first", [0.1, 3.0])
def test_training_a_step_finds_a_better_one(first: float) -> None:
    x, grid = values(1, 2000), Grid(num_bits=2)
    step = torch.full((1, 1), first, requires_grad=True)
    offset = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.SGD([step, offset], lr=0.3)
    losses = []
    for _ in range(80):
        loss = ((learned_step(x, grid, step, offset) - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The best four levels for a Gaussian, evenly spaced, give 0.119 (Max 1960, table II).
    assert losses[-1] < 1.2 * 0.119 < losses[0]


def test_half_precision_inputs_keep_their_dtype() -> None:
    x = values(3, 8).to(torch.bfloat16).requires_grad_()
    step = torch.full((1, 1), 0.1, requires_grad=True)
    result = learned_step(x, Grid(num_bits=4), step, torch.zeros(1, 1, requires_grad=True))
    result.sum().backward()
    assert result.dtype == x.grad.dtype == torch.bfloat16 and step.grad.dtype == torch.float32
