"""Removal with compensation, against least squares and brute force."""

import pytest
import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.pruning import obs
from hf_compress.pruning.obs import (
    Consumer,
    inverse_hessian,
    keep_best_of_each,
    removal_order,
    sparsegpt,
    without_units,
)


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, inputs] that can partly stand in for each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix


def layer(inputs: int = 8, per_unit: int = 1, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Consumer]:
    x = correlated(64, inputs, seed)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed + 2))
    return x, Consumer(weight, inverse_hessian(x.T @ x, 0.0), order.view(-1, per_unit))


def refitted(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The weight [O, I] that comes closest to the layer's outputs with some inputs alone."""
    solution = torch.zeros_like(weight)
    solution[:, kept] = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    return solution


def output_error(x: Tensor, weight: Tensor, changed: Tensor) -> float:
    return float((x @ (changed - weight).T).square().sum())


def removed_inputs(consumer: Consumer, units: list[int]) -> Tensor:
    kept = torch.ones(consumer.weight.shape[1], dtype=torch.bool)
    kept[consumer.index[units].flatten()] = False
    return kept


@pytest.mark.parametrize("per_unit", [1, 2])
def test_the_updated_weight_is_the_least_squares_solution(per_unit: int) -> None:
    x, consumer = layer(per_unit=per_unit)
    units = torch.tensor([2, 0])
    changed = without_units(consumer, units)
    kept = removed_inputs(consumer, units.tolist())
    torch.testing.assert_close(changed, refitted(x, consumer.weight, kept))
    assert bool((changed[:, ~kept] == 0).all())


@pytest.mark.parametrize("per_unit", [1, 2])
def test_the_order_is_that_of_brute_force_and_errors_are_those_of_the_outputs(per_unit: int) -> None:
    x, consumer = layer(per_unit=per_unit)
    count = len(consumer.index) - 1
    removal = removal_order([consumer], count)
    gone: list[int] = []
    for step in range(count):
        left = [unit for unit in range(len(consumer.index)) if unit not in gone]
        errors = {}
        for unit in left:
            kept = removed_inputs(consumer, [*gone, unit])
            errors[unit] = output_error(x, consumer.weight, refitted(x, consumer.weight, kept))
        gone.append(min(errors, key=errors.__getitem__))
        assert int(removal.order[step]) == gone[-1]
        assert float(removal.errors[step + 1]) == pytest.approx(errors[gone[-1]], rel=1e-6)
        after = without_units(consumer, removal.order[: step + 1])
        assert output_error(x, consumer.weight, after) == pytest.approx(float(removal.errors[step + 1]), rel=1e-6)


@pytest.mark.parametrize("per_unit", [1, 2])
def test_smaller_matrices_give_the_same_order(per_unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, consumer = layer(inputs=24, per_unit=per_unit, outputs=6)
    usual = removal_order([consumer], 24 // per_unit - 1)
    monkeypatch.setattr(obs, "COMPACT_BELOW", 0.0)
    whole = removal_order([consumer], 24 // per_unit - 1)
    assert torch.equal(usual.order, whole.order)
    torch.testing.assert_close(usual.errors, whole.errors)


def test_all_units_can_go() -> None:
    x, consumer = layer(per_unit=2)
    removal = removal_order([consumer], 4)
    assert sorted(removal.order.tolist()) == [0, 1, 2, 3]
    assert float(removal.errors[-1]) == pytest.approx(float((x @ consumer.weight.T).square().sum()), rel=1e-8)
    assert torch.equal(without_units(consumer, removal.order), torch.zeros_like(consumer.weight))


def test_several_consumers_are_weighed_together() -> None:
    cases = [layer(seed=0), layer(seed=7)]
    consumers = [Consumer(c.weight, c.inverse, torch.arange(8).view(8, 1)) for _, c in cases]
    first = removal_order(consumers, 1)
    totals = []
    for unit in range(8):
        kept = torch.arange(8) != unit
        totals.append(
            sum(
                output_error(x, c.weight, refitted(x, c.weight, kept))
                for (x, _), c in zip(cases, consumers, strict=True)
            )
        )
    assert int(first.order[0]) == min(range(8), key=totals.__getitem__)
    assert float(first.errors[1]) == pytest.approx(min(totals), rel=1e-8)
    alone = {int(removal_order([consumer], 1).order[0]) for consumer in consumers}
    assert len(alone) == 2  # so that the sum matters


def test_fixed_units_stay() -> None:
    _, consumer = layer()
    free = removal_order([consumer], 3).order.tolist()
    assert free[0] not in removal_order([consumer], 7, fixed=[free[0]]).order.tolist()


def test_units_can_be_permuted() -> None:
    _, consumer = layer(per_unit=2)
    shuffled = torch.tensor([3, 1, 0, 2])
    order = removal_order([consumer], 3).order
    other = removal_order([Consumer(consumer.weight, consumer.inverse, consumer.index[shuffled])], 3).order
    assert torch.equal(shuffled[other], order)


def exact_sequence(row: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """Optimal brain surgeon on one row, masked weights in the order of the columns, kept ones final when passed."""
    row = row.clone()
    for j in range(len(row)):
        if not keep[j]:
            inverse = torch.linalg.inv(hessian[j:, j:])
            row[j:] -= row[j] / inverse[0, 0] * inverse[0]
            row[j] = 0.0
    return row


@pytest.mark.parametrize("block_size", [3, 128])
def test_one_row_follows_the_exact_sequence(block_size: int) -> None:
    x = correlated(64, 12)
    hessian = x.T @ x
    row = torch.randn(1, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    changed, keep = sparsegpt(row, inverse_hessian(hessian, 0.0), sparsity=0.5, block_size=block_size)
    assert int((~keep).sum()) == 6
    torch.testing.assert_close(changed[0], exact_sequence(row[0], hessian, keep[0]))


def test_scores_are_the_errors_of_the_exact_sequence() -> None:
    x = correlated(64, 6)
    hessian = x.T @ x
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, keep = sparsegpt(row, inverse_hessian(hessian, 0.0), sparsity=1 / 6)
    costs = []
    for j in range(6):
        alone = exact_sequence(row[0], hessian, torch.arange(6) != j)
        costs.append(output_error(x, row, alone[None]))
    assert not keep[0, min(range(6), key=costs.__getitem__)]


def test_blocks_change_nothing_but_the_choice() -> None:
    _, consumer = layer(inputs=24, outputs=6)
    one, mask = sparsegpt(consumer.weight, consumer.inverse, pattern=(2, 4), block_size=24)
    several, other = sparsegpt(consumer.weight, consumer.inverse, pattern=(2, 4), block_size=6)  # made 4
    assert torch.equal(mask, other)
    torch.testing.assert_close(one, several)


@pytest.mark.parametrize(("sparsity", "block_size"), [(0.3, 5), (0.5, 128), (0.77, 7), (0.0, 4)])
def test_the_sparsity_is_met(sparsity: float, block_size: int) -> None:
    _, consumer = layer(inputs=24, outputs=7)
    changed, keep = sparsegpt(consumer.weight, consumer.inverse, sparsity=sparsity, block_size=block_size)
    assert int((~keep).sum()) == round(sparsity * 24 * 7)
    assert torch.equal(changed != 0, keep)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 3)])
def test_patterns_are_met_and_beat_magnitude(pattern: tuple[int, int]) -> None:
    x, consumer = layer(inputs=24, outputs=7)
    changed, keep = sparsegpt(consumer.weight, consumer.inverse, pattern=pattern)
    counts = keep.view(7, -1, pattern[1]).sum(-1)
    assert bool((counts == pattern[0]).all())
    assert torch.equal(changed != 0, keep)
    magnitude = consumer.weight * keep_best_of_each(consumer.weight.abs(), pattern)
    assert output_error(x, consumer.weight, changed) < 0.9 * output_error(x, consumer.weight, magnitude)


def test_the_best_of_each_are_kept() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    expected = torch.tensor([[False, True, True, False, True, False, True, False]])
    assert torch.equal(keep_best_of_each(scores, (2, 4)), expected)


def test_damping_pulls_towards_removal_without_compensation() -> None:
    x, consumer = layer()
    gram = x.T @ x
    distances = []
    for damping in (0.0, 1.0, 1e6):
        damped = Consumer(consumer.weight, inverse_hessian(gram, damping), consumer.index)
        changed = without_units(damped, torch.tensor([0]))
        plain = consumer.weight.clone()
        plain[:, consumer.index[0]] = 0.0
        distances.append(float((changed - plain).norm()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-4


def test_dead_inputs_cost_nothing_with_damping() -> None:
    x = correlated(64, 6)
    x[:, 2] = 0.0
    weight = torch.ones(3, 6, dtype=torch.float64)
    consumer = Consumer(weight, inverse_hessian(x.T @ x), torch.arange(6).view(6, 1))
    assert int(removal_order([consumer], 1).order[0]) == 2


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(3, 3), "singular"),
        (torch.ones(3, 3), "singular"),
        (torch.full((3, 3), float("nan")), "not finite"),
    ],
)
def test_bad_second_moments_are_refused(gram: Tensor, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        inverse_hessian(gram, 0.0)


@pytest.mark.parametrize("pattern", [(2, 5), (4, 4), (0, 4)])
def test_patterns_that_do_not_fit_are_refused(pattern: tuple[int, int]) -> None:
    _, consumer = layer(inputs=8)
    with pytest.raises(TargetError, match="multiple of m"):
        sparsegpt(consumer.weight, consumer.inverse, pattern=pattern)


def test_exactly_one_kind_of_target() -> None:
    _, consumer = layer()
    with pytest.raises(TargetError, match="exactly one"):
        sparsegpt(consumer.weight, consumer.inverse)
    with pytest.raises(TargetError, match="exactly one"):
        sparsegpt(consumer.weight, consumer.inverse, sparsity=0.5, pattern=(2, 4))


def test_the_dtype_is_kept() -> None:
    x = correlated(64, 8).float()
    weight = torch.randn(4, 8)
    inverse = inverse_hessian(x.T @ x)
    assert inverse.dtype == torch.float64
    assert sparsegpt(weight, inverse, sparsity=0.5)[0].dtype == torch.float32
    consumer = Consumer(weight.bfloat16(), inverse, torch.arange(8).view(8, 1))
    assert without_units(consumer, torch.tensor([1])).dtype == torch.bfloat16
