import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.pruning.obs import inverse_hessian
from hf_compress.quantization.clipping import extremes, mse_range
from hf_compress.quantization.granularity import per_group
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.rounding import RoundedWeight, activation_order, gptq, round_to_nearest

DAMPING = 0.01


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    """A weight, the second moments of correlated inputs, and the damped Hessian."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(3 * inputs, inputs, generator=generator) @ mixing
    weight = torch.randn(outputs, inputs, generator=generator)
    gram = x.T @ x
    hessian = gram.double().numpy()
    return weight, gram, hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(inputs)


def grids() -> list[Grid]:
    return [Grid(num_bits=4), Grid(num_bits=3, symmetric=False), Grid(num_bits=4, signed=False, symmetric=False)]


def grid_of(values: np.ndarray, grid: Grid) -> tuple[float, int]:
    low, high = torch.tensor([values.min()]).float(), torch.tensor([values.max()]).float()
    scale, zero_point = grid.parameters(low, high)
    return float(scale), 0 if zero_point is None else int(zero_point)


def nearest(value: float, grid: Grid, scale: float, zero_point: int) -> int:
    return int(
        np.clip(np.round(np.float32(value) * (np.float32(1) / np.float32(scale))) + zero_point, grid.low, grid.high)
    )


def obq_row(row: np.ndarray, hessian: np.ndarray, grid: Grid, order: list[int], size: int, static: bool) -> tuple:
    """Optimal brain quantization in a given order, with the inverse of each remaining Hessian computed anew."""
    start, row = row.copy(), row.copy()
    integers = np.zeros(len(row), dtype=int)
    parameters: dict[int, tuple[float, int]] = {}
    for position, j in enumerate(order):
        group = j // size
        if group not in parameters:
            source = start if static else row
            parameters[group] = grid_of(source[group * size : (group + 1) * size], grid)
        scale, zero_point = parameters[group]
        integers[j] = nearest(row[j], grid, scale, zero_point)
        rest = order[position:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        error = row[j] - (integers[j] - zero_point) * scale
        row[rest] -= error / inverse[0, 0] * inverse[0]
    values = np.array([(integers[j] - parameters[j // size][1]) * parameters[j // size][0] for j in range(len(row))])
    change = values - start
    return integers, change @ hessian @ change


def plain_row(row: np.ndarray, hessian: np.ndarray, grid: Grid, size: int) -> tuple:
    integers, values = np.zeros(len(row), dtype=int), np.zeros(len(row))
    for j in range(len(row)):
        scale, zero_point = grid_of(row[j // size * size : (j // size + 1) * size], grid)
        integers[j] = nearest(row[j], grid, scale, zero_point)
        values[j] = (integers[j] - zero_point) * scale
    return integers, (values - row) @ hessian @ (values - row)


@pytest.mark.parametrize("grid", grids(), ids=str)
@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("block_size", [5, 128])
def test_it_equals_the_sequential_formula_of_optimal_brain_quantization(
    grid: Grid, size: int, ordered: bool, block_size: int
) -> None:
    weight, gram, hessian = problem(6, 12)
    order = activation_order(gram) if ordered else None
    inverse = inverse_hessian(gram, DAMPING)
    result = gptq(weight, inverse, grid, group_size=size, order=order, block_size=block_size)
    places = list(range(12)) if order is None else order.tolist()
    fed_forward = 0
    for i in range(6):
        row = weight[i].double().numpy()
        candidates = [
            obq_row(row, hessian, grid, places, size or 12, static=ordered or size == 0),
            plain_row(row, hessian, grid, size or 12),
        ]
        integers, error = min(candidates, key=lambda candidate: candidate[1])
        fed_forward += error == candidates[0][1]
        assert result.integers[i].tolist() == integers.tolist()
        assert result.error[i].item() == pytest.approx(error, rel=1e-4)
    assert fed_forward >= 3


@given(seed=st.integers(0, 10_000), num_bits=st.integers(2, 3), symmetric=st.booleans(), ordered=st.booleans())
@settings(max_examples=25, deadline=None)
def test_it_lies_between_the_optimum_by_brute_force_and_plain_rounding(
    seed: int, num_bits: int, symmetric: bool, ordered: bool
) -> None:
    grid = Grid(num_bits=num_bits, symmetric=symmetric)
    weight, gram, hessian = problem(2, 4, seed)
    order = activation_order(gram) if ordered else None
    result = gptq(weight, inverse_hessian(gram, DAMPING), grid, order=order)
    plain = round_to_nearest(weight, grid)
    assert torch.equal(result.scale, plain.scale)  # one range a row, of the original weights
    choices = np.array(list(itertools.product(range(grid.low, grid.high + 1), repeat=4)))
    for i in range(2):
        row = weight[i].double().numpy()
        zero_point = 0 if result.zero_point is None else int(result.zero_point[i])
        changes = (choices - zero_point) * float(result.scale[i]) - row
        optimum = np.einsum("ni,ij,nj->n", changes, hessian, changes).min()
        change, nearest_change = result.weight[i].double().numpy() - row, plain.weight[i].double().numpy() - row
        error = change @ hessian @ change
        assert optimum * (1 - 1e-5) <= error <= nearest_change @ hessian @ nearest_change * (1 + 1e-5)
        assert result.error[i].item() == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("size", [0, 8])
def test_correlated_inputs_lose_much_less_than_with_plain_rounding(size: int) -> None:
    weight, gram, hessian = problem(16, 32, seed=3)
    grid = Grid(num_bits=4)
    result = gptq(weight, inverse_hessian(gram, DAMPING), grid, group_size=size)
    errors = []
    for each in (result, round_to_nearest(weight, grid, group_size=size)):
        change = (each.weight - weight).double().numpy()
        errors.append(np.trace(change @ hessian @ change.T))
    assert errors[0] < 0.5 * errors[1]


def test_uncorrelated_inputs_are_rounded_plainly() -> None:
    weight = problem(5, 8)[0]
    diagonal = torch.diag(torch.arange(1.0, 9.0))
    result = gptq(weight, inverse_hessian(diagonal, 0.0), Grid(num_bits=4), group_size=4)
    plain = round_to_nearest(weight, Grid(num_bits=4), group_size=4)
    assert torch.equal(result.integers, plain.integers) and torch.equal(result.weight, plain.weight)


@pytest.mark.parametrize("grid", grids(), ids=str)
def test_the_weight_is_what_integers_and_steps_say(grid: Grid) -> None:
    weight, gram, _ = problem(6, 12)
    inverse = inverse_hessian(gram, DAMPING)
    results = [
        round_to_nearest(weight, grid, group_size=4),
        gptq(weight, inverse, grid, group_size=4),
        gptq(weight.to(torch.bfloat16), inverse, grid, group_size=4, order=activation_order(gram)),
    ]
    for result in results:
        assert isinstance(result, RoundedWeight)
        assert result.integers.dtype == grid.dtype and result.scale.shape == (6, 3)
        assert int(result.integers.min()) >= grid.low and int(result.integers.max()) <= grid.high
        scale = result.scale.repeat_interleave(4, dim=1)
        zero_point = 0 if result.zero_point is None else result.zero_point.repeat_interleave(4, dim=1)
        assert torch.equal(result.weight, ((result.integers.float() - zero_point) * scale).to(result.weight.dtype))
    assert results[-1].weight.dtype == torch.bfloat16


def test_plain_rounding_is_that_of_torchao() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, grid = problem(6, 12)[0], Grid(num_bits=4, symmetric=False)
    result = round_to_nearest(weight, grid, group_size=4)
    eps = torch.finfo(torch.float32).eps
    scale, zero_point = primitives.choose_qparams_affine(
        weight, primitives.MappingType.ASYMMETRIC, (1, 4), torch.int8, grid.low, grid.high, eps=eps
    )
    assert torch.equal(result.scale, scale) and torch.equal(result.zero_point, zero_point)
    integers = primitives.quantize_affine(weight, (1, 4), scale, zero_point, torch.int8, grid.low, grid.high)
    assert torch.equal(result.integers, integers)
    assert torch.allclose(result.error, (result.weight - weight).double().square().sum(1))


def test_ranges_can_be_chosen_otherwise() -> None:
    weight, gram, _ = problem(6, 12)
    grid = Grid(num_bits=3)

    def choose(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return mse_range(blocks, None, grid, extremes(blocks), num_candidates=20)

    narrow = gptq(weight, inverse_hessian(gram, DAMPING), grid, choose=choose)
    wide = gptq(weight, inverse_hessian(gram, DAMPING), grid)
    blocks = per_group(12).blocks(weight)
    assert torch.equal(narrow.scale[:, 0], grid.parameters(*choose(blocks))[0])
    assert not torch.equal(narrow.scale, wide.scale)


def test_removed_inputs_stay_zero() -> None:
    weight, gram, _ = problem(6, 12)
    removed = torch.tensor([2, 7])
    weight[:, removed] = 0.0
    gram[removed] = 0.0
    gram[:, removed] = 0.0
    result = gptq(weight, inverse_hessian(gram, DAMPING), Grid(num_bits=4, symmetric=False), group_size=6)
    assert not result.weight[:, removed].any()
    kept = [j for j in range(12) if j not in (2, 7)]
    small = gptq(weight[:, kept], inverse_hessian(gram[kept][:, kept], DAMPING * 10 / 12), Grid(num_bits=4))
    large = gptq(weight, inverse_hessian(gram, DAMPING), Grid(num_bits=4))
    assert torch.equal(small.integers, large.integers[:, kept])


def test_problems_that_cannot_be_solved_are_refused() -> None:
    weight, gram, _ = problem(6, 12)
    with pytest.raises(TargetError, match="not positive definite"):
        gptq(weight, -torch.eye(12), Grid(num_bits=4))
    with pytest.raises(TargetError, match="multiple of size=5"):
        gptq(weight, inverse_hessian(gram), Grid(num_bits=4), group_size=5)


def test_the_order_is_by_falling_second_moment() -> None:
    gram = torch.diag(torch.tensor([1.0, 5.0, 3.0, 5.0]))
    assert activation_order(gram).tolist() == [1, 3, 2, 0]
    assert partial(activation_order, gram)().dtype == torch.int64
