"""Mask search, rearrangement and tuning, against brute force and least squares."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.pruning.kwon import Family, Reconstruction, rearrange, search_masks, tune_scales


def family(sizes: dict[str, int], cost: float, seed: int = 0, floor: int = 0) -> Family:
    generator = torch.Generator().manual_seed(seed)
    fisher = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    return Family(fisher, dict.fromkeys(sizes, cost), dict.fromkeys(sizes, floor))


def all_masks(sizes: dict[str, int]) -> list[dict[str, Tensor]]:
    total = sum(sizes.values())
    found = []
    for bits in itertools.product([False, True], repeat=total):
        parts = torch.tensor(bits).split(list(sizes.values()))
        found.append(dict(zip(sizes, parts, strict=True)))
    return found


def lost(families: list[Family], masks: dict[str, Tensor]) -> float:
    return sum(float(values[~masks[name]].sum()) for each in families for name, values in each.fisher.items())


def spent(families: list[Family], masks: dict[str, Tensor]) -> float:
    return sum(each.cost[name] * int(masks[name].sum()) for each in families for name in each.fisher)


@pytest.mark.parametrize("budget", [4.0, 9.0, 14.5, 22.0])
@pytest.mark.parametrize("floor", [0, 1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_masks_lose_less_within_the_budget(budget: float, floor: int, seed: int) -> None:
    families = [family({"a": 2, "b": 3}, 3.0, seed, floor), family({"c": 3, "d": 3}, 1.0, seed + 10, floor)]
    if floor and budget < 8:
        with pytest.raises(TargetError, match="cost 8"):
            search_masks(*families, budget)
        return
    masks = search_masks(*families, budget)
    assert spent(families, masks) <= budget
    allowed = [
        candidate
        for candidate in all_masks({"a": 2, "b": 3, "c": 3, "d": 3})
        if spent(families, candidate) <= budget and all(int(mask.sum()) >= floor for mask in candidate.values())
    ]
    assert lost(families, masks) == pytest.approx(min(lost(families, each) for each in allowed), rel=1e-6)


def test_one_family_alone_and_the_whole_budget() -> None:
    only = family({"a": 4, "b": 4}, 2.0)
    masks = search_masks(only, Family({}, {}, {}), 6.0)
    best = torch.cat(list(only.fisher.values())).topk(3).values
    kept = torch.cat([values[masks[name]] for name, values in only.fisher.items()])
    assert torch.equal(kept.sort().values, best.sort().values)
    assert all(bool(mask.all()) for mask in search_masks(only, family({"c": 2}, 1.0), 18.0).values())


def removed_norm(gradients: Tensor, mask: Tensor) -> float:
    return float(gradients[:, ~mask].sum(1).square().sum())


@pytest.mark.parametrize("seed", range(6))
def test_no_single_swap_is_better_and_brute_force_is_hardly(seed: int) -> None:
    gradients = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = torch.ones(8, dtype=torch.bool)
    start[gradients.square().sum(0).argsort()[:4]] = False
    mask = rearrange(start, gradients)
    assert int(mask.sum()) == 4
    value = removed_norm(gradients, mask)
    assert value <= removed_norm(gradients, start)
    for out, back in itertools.product(mask.nonzero().flatten(), (~mask).nonzero().flatten()):
        swapped = mask.clone()
        swapped[out], swapped[back] = False, True
        assert removed_norm(gradients, swapped) >= value * (1 - 1e-8)
    others = (
        torch.ones(8).bool().index_fill(0, torch.tensor(gone), False) for gone in itertools.combinations(range(8), 4)
    )
    assert value <= 1.3 * min(removed_norm(gradients, each) for each in others)


def test_units_with_opposite_effects_go_together() -> None:
    gradients = torch.tensor([[1.0, 1.1, -1.2, 3.0], [2.0, 2.2, -2.4, 3.0]])
    start = torch.tensor([False, False, True, True])  # the smallest gradients, but both of one sign
    assert rearrange(start, gradients).tolist() == [True, False, False, True]
    assert rearrange(start, gradients, fixed=(2,)).tolist() == start.tolist()


@pytest.mark.parametrize("kept", [0, 4])
def test_nothing_to_swap(kept: int) -> None:
    mask = torch.full((4,), bool(kept))
    assert torch.equal(rearrange(mask, torch.randn(3, 4)), mask)


def layer(seed: int = 0, per_unit: int = 2) -> tuple[Tensor, Tensor, Reconstruction]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    dense = torch.randn(60, 8, generator=generator, dtype=torch.float64) @ mix
    pruned = dense + 0.3 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    index = torch.randperm(8, generator=generator).view(-1, per_unit)
    return dense, pruned, Reconstruction(weight, index, pruned.T @ pruned, dense.T @ pruned)


def contributions(x: Tensor, each: Reconstruction, kept: Tensor) -> Tensor:
    """What every kept unit adds to the outputs, [tokens * outputs, kept]."""
    columns = [(x[:, own] @ each.weight[:, own].T).flatten() for own in each.index[kept]]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("per_unit", [1, 2])
@pytest.mark.parametrize("damping", [1e-9, 0.01, 0.5])
def test_scales_are_the_damped_least_squares_solution(per_unit: int, damping: float) -> None:
    layers = [layer(seed, per_unit) for seed in (0, 1)]
    mask = torch.ones(8 // per_unit, dtype=torch.bool)
    mask[1] = False
    kept = mask.nonzero().flatten()
    matrix = torch.cat([contributions(pruned, each, kept) for _, pruned, each in layers])
    target = torch.cat([(dense @ each.weight.T).flatten() for dense, _, each in layers])
    strength = (damping * matrix.square().sum(0).mean()).sqrt()
    augmented = torch.cat([matrix, strength * torch.eye(len(kept), dtype=torch.float64)])
    expected = torch.linalg.lstsq(augmented, torch.cat([target, strength.expand(len(kept))])).solution
    scales = tune_scales(mask, [each for _, _, each in layers], damping)
    torch.testing.assert_close(scales[kept], expected, rtol=1e-6, atol=1e-8)
    assert float(scales[1]) == 0.0


def test_without_pruning_all_scales_are_one() -> None:
    dense, _, each = layer()
    gram = dense.T @ dense
    scales = tune_scales(torch.ones(4, dtype=torch.bool), [Reconstruction(each.weight, each.index, gram, gram)])
    torch.testing.assert_close(scales, torch.ones(4, dtype=torch.float64))


def test_a_layer_with_a_scale_above_ten_is_left_alone() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, index = torch.eye(2, dtype=torch.float64), torch.tensor([[0], [1]])
    mask = torch.ones(2, dtype=torch.bool)
    for factor, allowed in ((9.0, True), (11.0, False), (-11.0, False)):
        dense = x * torch.tensor([factor, 1.0])
        scales = tune_scales(mask, [Reconstruction(weight, index, x.T @ x, dense.T @ x)], 1e-9)
        expected = [factor, 1.0] if allowed else [1.0, 1.0]
        torch.testing.assert_close(scales, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_silent_units_keep_their_scale() -> None:
    weight, index = torch.eye(2), torch.tensor([[0], [1]])
    nothing = torch.zeros(2, 2)
    scales = tune_scales(torch.tensor([True, False]), [Reconstruction(weight, index, nothing, nothing)])
    assert scales.tolist() == [1.0, 0.0]
