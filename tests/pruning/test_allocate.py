import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress import TargetError
from hf_compress.pruning.allocate import (
    Layer,
    achieved_sparsity,
    allocate,
    check_reachable,
    keep_best,
    protected,
    ties,
    tolerance,
)
from hf_compress.registry import allocators

SCORES = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([8.0, 7.0, 6.0, 5.0])}


def layers(sizes, **limits):
    return {name: Layer(num_units=size, **limits) for name, size in sizes.items()}


FOURS = {"a": 4, "b": 4}


def test_per_layer_takes_the_same_share_of_each() -> None:
    masks = allocate(SCORES, 0.5, layers(FOURS), "per_layer")
    assert masks["a"].tolist() == [True, False, True, False]
    assert masks["b"].tolist() == [True, True, False, False]


def test_global_lets_layers_compete() -> None:
    masks = allocate(SCORES, 0.375, layers(FOURS), "global")
    assert masks["a"].tolist() == [True, False, False, False]
    assert masks["b"].all()


def test_isomorphic_lets_layers_of_the_same_form_compete() -> None:
    scores = SCORES | {"c": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    forms = {name: Layer(num_units=4, shape="small" if name == "c" else "large") for name in scores}
    masks = allocate(scores, 0.5, forms, "isomorphic")
    assert [int(mask.sum()) for mask in masks.values()] == [1, 3, 2]
    assert masks["c"].tolist() == [False, False, True, True]


def test_global_honors_the_limit_of_a_single_layer() -> None:
    masks = allocate(SCORES, 0.5, layers(FOURS, max_sparsity=0.5), "global")
    assert [int(mask.sum()) for mask in masks.values()] == [2, 2]
    masks = allocate(SCORES, 0.5, layers(FOURS, min_units=3), "global")
    assert [int(mask.sum()) for mask in masks.values()] == [3, 3]  # the limit wins; check_reachable refuses before


def test_fixed_units_stay_whatever_their_score() -> None:
    masks = allocate(SCORES, 0.75, layers(FOURS, fixed_units=(1,)), "global")
    assert masks["a"].tolist() == [False, True, False, False]
    assert masks["b"].tolist() == [False, True, False, False]


def test_ties_reach_on_and_must_all_be_there() -> None:
    names = {"a": ("b",), "b": ("d",), "c": (), "d": ()}
    limits = {name: Layer(num_units=4, tied_to=others) for name, others in names.items()}
    assert ties(limits) == [("a", "b", "d"), ("c",)]
    del limits["d"]
    with pytest.raises(TargetError, match="'b' must keep the same share of its units as 'd', which takes no part"):
        ties(limits)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"min_units": 0}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"min_units": 0, "multiple_of": 3}, [0, 3, 6, 7]),
        ({"min_units": 4, "multiple_of": 3}, [6, 7]),
        ({"max_sparsity": 0.5}, [4, 5, 6, 7]),
        ({"fixed_units": (0, 1, 2), "multiple_of": 2}, [4, 6, 7]),
        ({"min_units": 9}, [7]),
    ],
)
def test_numbers_of_units_that_limits_allow(limits, expected) -> None:
    assert Layer(num_units=7, **limits).counts() == expected


def test_layers_without_any_unit_are_allowed_where_nothing_has_to_stay() -> None:
    masks = allocate(SCORES, 0.5, layers(FOURS, min_units=0), "global")
    assert not masks["a"].any() and masks["b"].all()


def test_tied_layers_keep_the_same_share() -> None:
    """Of 4 and of 8 units, always as many fourths."""
    scores = {"a": torch.tensor([9.0, 8.0, 1.0, 1.0]), "b": torch.arange(8.0), "c": torch.full((4,), 4.0)}
    others = {"a": ("b",), "b": ("a",), "c": ()}
    sizes = {name: Layer(num_units=len(score), tied_to=others[name]) for name, score in scores.items()}
    for sparsity in (0.0, 0.25, 0.5, 0.6, 0.75):
        masks = allocate(scores, sparsity, sizes, "global")
        assert 2 * int(masks["a"].sum()) == int(masks["b"].sum())
        assert abs(achieved_sparsity(masks) - sparsity) <= tolerance(sizes, "global")
        for name, mask in masks.items():
            if 0 < int(mask.sum()) < len(mask):
                assert scores[name][mask].min() >= scores[name][~mask].max()


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(allocators)),
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    sparsity=st.floats(0, 0.99),
    multiple=st.sampled_from([1, 4, 8]),
    tied=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_allocation_reaches_the_sparsity_within_its_limits(name, sizes, sparsity, multiple, tied, seed) -> None:
    """Conformance: any registered allocation, any sizes."""
    generator = torch.Generator().manual_seed(seed)
    scores = {f"g{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    others = tuple(scores) if tied else ()
    limits = {
        key: Layer(num_units=len(score), multiple_of=multiple, tied_to=others, shape=str(len(score)))
        for key, score in scores.items()
    }
    try:
        check_reachable("structures['ffn']", sparsity, limits, name)
    except TargetError:
        return
    masks = allocate(scores, sparsity, limits, name)
    assert abs(achieved_sparsity(masks) - sparsity) <= tolerance(limits, name) + 1e-9
    shares = {int(mask.sum()) / len(mask) for mask in masks.values()}
    assert not tied or max(shares) - min(shares) < 1e-9
    for key, mask in masks.items():
        kept = int(mask.sum())
        assert kept == len(mask) or (kept >= 1 and kept % multiple == 0)
        if 0 < kept < len(mask):
            assert scores[key][mask].min() >= scores[key][~mask].max()


def test_many_units_are_chosen_as_by_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(20_000, generator=generator) for name in "ab"}
    masks = allocate(scores, 0.9, layers({"a": 20_000, "b": 20_000}, min_units=0), "global")
    every = torch.cat(list(scores.values())).sort(descending=True).values
    assert torch.equal(torch.cat([scores[name] >= every[3999] for name in "ab"]), torch.cat(list(masks.values())))


def test_equal_scores_are_kept_in_order() -> None:
    assert keep_best(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), 3).tolist() == [True, True, True, False, False]
    assert keep_best(torch.ones(3), 0).tolist() == [False] * 3
    assert keep_best(torch.ones(3), 3).tolist() == [True] * 3


def test_the_best_of_each_run_is_protected() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0])
    infinite = protected(scores, 4, 2).isinf()
    assert infinite.tolist() == [False, False, True, True, True, True, False, False]
    assert math.isfinite(float(protected(scores, 4, 2)[0]))


def test_unreachable_sparsity_says_what_is_reachable() -> None:
    with pytest.raises(TargetError, match=r"structures\['heads'\].*highest sparsity allowed here is 0\.5000"):
        check_reachable("structures['heads']", 0.9, layers(FOURS, min_units=2), "global")


def test_units_may_count_differently() -> None:
    """Half of what they count goes, not half of them."""
    sizes = torch.tensor([1.0, 1.0, 10.0, 8.0])
    limits = {"a": Layer(num_units=4, min_units=0, unit_sizes=sizes)}
    masks = allocate({"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}, 0.6, limits, "global")
    assert masks["a"].tolist() == [False, False, False, True]
    assert achieved_sparsity(masks, limits) == pytest.approx(0.6)
    assert achieved_sparsity(masks) == 0.75


@pytest.mark.parametrize(("sizes", "sparsity", "multiple"), [({"a": 48}, 0.5, 64), ({"a": 4, "b": 4}, 0.1, 1)])
def test_a_sparsity_that_rounds_to_nothing_is_refused(sizes, sparsity, multiple) -> None:
    allocation = "per_layer" if multiple == 1 else "global"
    with pytest.raises(TargetError, match=r"nothing would be removed|highest sparsity allowed here"):
        check_reachable("structures['ffn']", sparsity, layers(sizes, multiple_of=multiple), allocation)
    check_reachable("structures['ffn']", 0.0, layers(sizes, multiple_of=multiple), allocation)
