import itertools
import math

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_models import prunable

from hf_compress import ConfigError, TargetError, make_example_inputs, profile, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import group_limits
from hf_compress.pruning.allocate import Layer
from hf_compress.pruning.budget import (
    RankedScores,
    TimedLevel,
    choices_of,
    within_cost,
    within_latency,
)

SHARE_OF_BEST = 0.9
"""What the greedy choice kept at least, of the best possible score, on random instances of coupled costs."""


def kept_score(scores, masks) -> float:
    return sum(float(scores[name][mask].sum()) for name, mask in masks.items())


def best_by_trying(scores, limits, cost, budget) -> float:
    """The highest score within the budget, by trying all numbers of units."""
    ranked = RankedScores(scores, limits)
    choices = choices_of(ranked.layers)
    best = -math.inf
    for levels in itertools.product(*(range(len(choice.levels)) for choice in choices)):
        kept = {k: v for choice, level in zip(choices, levels, strict=True) for k, v in choice.kept(level).items()}
        if cost(kept) <= budget:
            best = max(best, kept_score(scores, ranked.masks(kept)))
    return best


def random_scores(sizes, seed) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"g{i}": torch.rand(n, generator=generator) ** 2 for i, n in enumerate(sizes)}


def largest_step(scores, limits) -> float:
    ranked = RankedScores(scores, limits)
    choices = choices_of(ranked.layers)
    return max(float(ranked.kept(c).diff().max()) for c in choices if len(c.levels) > 1)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    prices=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    multiple=st.sampled_from([1, 2, 3]),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 10**6),
)
def test_with_fixed_prices_less_than_one_step_is_lost(sizes, prices, multiple, share, seed) -> None:
    scores = random_scores(sizes, seed)
    limits = {name: Layer(num_units=len(score), min_units=0, multiple_of=multiple) for name, score in scores.items()}

    def cost(kept) -> int:
        return 7 + sum(price * kept[name] for price, name in zip(prices, kept, strict=False))

    budget = 7 + int(share * (cost({name: len(s) for name, s in scores.items()}) - 7))
    masks = within_cost(scores, limits, cost, budget)
    assert cost({name: int(mask.sum()) for name, mask in masks.items()}) <= budget
    best = best_by_trying(scores, limits, cost, budget)
    assert best - largest_step(scores, limits) - 1e-9 <= kept_score(scores, masks) <= best + 1e-9


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0.1, 1.0), seed=st.integers(0, 10**6))
def test_with_coupled_prices_nearly_the_best_is_kept(share, seed) -> None:
    """A residual stream that all matrices share, as in a Transformer: costs are products."""
    scores = random_scores([6, 5, 5, 4], seed)
    scores["hidden"] = scores.pop("g0")
    limits = {name: Layer(num_units=len(score)) for name, score in scores.items()}

    def cost(kept) -> int:
        inner = 3 * kept["g1"] + 3 * kept["g2"] + 8 * kept["g3"]
        return kept["hidden"] * (inner + 10) + kept["hidden"] ** 2

    lowest, highest = cost(dict.fromkeys(scores, 1)), cost({name: len(s) for name, s in scores.items()})
    budget = lowest + int(share * (highest - lowest))
    masks = within_cost(scores, limits, cost, budget)
    assert cost({name: int(mask.sum()) for name, mask in masks.items()}) <= budget
    best = best_by_trying(scores, limits, cost, budget)
    assert SHARE_OF_BEST * best <= kept_score(scores, masks) <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 10**6))
def test_no_group_could_take_one_more_step(share, seed) -> None:
    scores = random_scores([9, 30, 17], seed)
    multiples = {"g0": 2, "g1": 4, "g2": 1}
    limits = {name: Layer(num_units=len(scores[name]), multiple_of=multiple) for name, multiple in multiples.items()}
    prices = {"g0": 100, "g1": 7, "g2": 13}

    def cost(kept) -> int:
        return sum(prices[name] * count for name, count in kept.items())

    lowest = cost({"g0": 2, "g1": 4, "g2": 1})
    budget = lowest + int(share * (cost({"g0": 9, "g1": 30, "g2": 17}) - lowest))
    kept = {name: int(mask.sum()) for name, mask in within_cost(scores, limits, cost, budget).items()}
    for name, count in kept.items():
        more = next((n for n in limits[name].counts() if n > count), None)
        assert more is None or cost({**kept, name: more}) > budget


def test_the_best_units_of_a_group_stay_and_fixed_ones_do() -> None:
    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([0.1, 0.2])}
    limits = {"a": Layer(num_units=4, fixed_units=(1,)), "b": Layer(num_units=2)}
    masks = within_cost(scores, limits, lambda kept: sum(kept.values()), 4)
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [False, True]


def test_tied_groups_keep_the_same_share() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([1.0, 9.0]), "c": torch.ones(3)}
    limits = {"a": Layer(num_units=4, tied_to=("b",)), "b": Layer(num_units=2, tied_to=("a",))}
    masks = within_cost(scores, limits, lambda kept: sum(kept.values()), 5)
    assert masks["a"].tolist() == [False, False, True, True]
    assert masks["b"].tolist() == [False, True]
    assert int(masks["c"].sum()) == 2


def test_units_of_negative_score_stay_only_where_limits_ask() -> None:
    scores = {"a": torch.tensor([1.0, -1.0, 2.0, -1.0]), "b": torch.tensor([-1.0, -1.0])}
    masks = within_cost(scores, {"b": Layer(num_units=2)}, lambda kept: sum(kept.values()), 100)
    assert masks["a"].tolist() == [True, False, True, False]
    assert int(masks["b"].sum()) == 1


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    scores = {"a": torch.ones(10), "b": torch.ones(10)}
    limits = {"a": Layer(num_units=10, min_units=4), "b": Layer(num_units=10, multiple_of=3)}
    with pytest.raises(TargetError, match=r"budget: 1,000 cannot be reached.* the cost is 1,006"):
        within_cost(scores, limits, lambda kept: 999 + sum(kept.values()), 1000)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"a": Layer(num_units=8, tied_to=("c",))}, TargetError, "must keep the same share of its units as 'c'"),
        ({"c": Layer(num_units=8)}, TargetError, r"limits\['c'\]: no scores are given"),
        ({"a": Layer(num_units=9)}, ConfigError, r"limits\['a'\]: they are those of 9 units, but there are 8 scores"),
    ],
)
def test_impossible_limits_are_refused(limits, error, message) -> None:
    with pytest.raises(error, match=message):
        within_cost({"a": torch.ones(8)}, limits, lambda kept: kept["a"], 5)


@pytest.mark.parametrize("scores", [{}, {"a": torch.tensor([1.0, math.nan])}, {"a": torch.ones(2, 2)}])
def test_scores_that_say_nothing_are_refused(scores) -> None:
    with pytest.raises(ConfigError, match="scores"):
        within_cost(scores, {}, lambda kept: 0, 5)


def test_many_units_need_few_costs() -> None:
    """The cost function of a real model takes about a millisecond."""
    scores = random_scores([3072] * 12 + [12] * 12, 0)
    calls = []

    def cost(kept) -> int:
        calls.append(None)
        return sum(count * (1536 if len(scores[name]) > 12 else 196_608) for name, count in kept.items())

    budget = cost({name: len(score) for name, score in scores.items()}) // 3
    masks = within_cost(scores, {}, cost, budget)
    assert 0 <= budget - cost({name: int(mask.sum()) for name, mask in masks.items()}) < 1536
    assert len(calls) < 1000


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_the_shrunk_model_costs_what_was_asked_for(name, share, measure) -> None:
    """Also with the residual stream, whose width multiplies everything else."""
    model = getattr(tiny_models, name)()
    inputs = make_example_inputs(model)
    graph = ModelGraph(model, inputs)
    groups = prunable(graph.groups, "heads", "ffn", "hidden")
    rng = torch.Generator().manual_seed(0)
    scores = {g.name: g.parameters_per_unit * torch.rand(g.num_units, generator=rng) for g in groups}
    cost = getattr(graph.costs, measure)
    budget = int(share * cost({}))
    masks = within_cost(scores, group_limits(groups), cost, budget)
    found = getattr(profile(shrink(model, masks, example_inputs=inputs), inputs, latency=False), measure)
    assert 0.9 * budget < found <= budget


def random_levels(num_structures: int, num_levels: int, seed: int) -> dict[str, list[TimedLevel]]:
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.rand(num_structures, num_levels, generator=generator).tolist()
    losses = torch.rand(num_structures, num_levels, generator=generator).tolist()
    return {
        f"s{i}": [TimedLevel(t, loss) for t, loss in zip(*row, strict=True)]
        for i, row in enumerate(zip(seconds, losses, strict=True))
    }


def picked(levels, chosen) -> tuple[float, float]:
    each = [levels[name][position] for name, position in chosen.items()]
    return sum(level.seconds for level in each), sum(level.loss for level in each)


def best_loss(levels, budget: float) -> float:
    found = [picked(levels, dict(zip(levels, row, strict=True))) for row in itertools.product(range(4), repeat=4)]
    return min((loss for seconds, loss in found if seconds <= budget), default=math.inf)


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 10**6), num_buckets=st.sampled_from([1, 7, 100, 10_000]))
def test_the_dynamic_program_is_as_good_as_trying_everything(share, seed, num_buckets) -> None:
    levels = random_levels(4, 4, seed)
    fastest = sum(min(level.seconds for level in each) for each in levels.values())
    slowest = sum(max(level.seconds for level in each) for each in levels.values())
    budget = fastest + share * (slowest - fastest)
    seconds, loss = picked(levels, within_latency(levels, budget, num_buckets=num_buckets))
    assert seconds <= budget * (1 + 1e-12)
    rounding = len(levels) * (budget - fastest) / num_buckets
    assert best_loss(levels, budget) - 1e-12 <= loss
    assert loss <= best_loss(levels, max(budget - rounding, fastest * (1 + 1e-12))) + 1e-12


def test_a_level_that_is_slower_and_worse_is_never_chosen() -> None:
    levels = {
        "a": [TimedLevel(1.0, 0.5), TimedLevel(2.0, 0.6), TimedLevel(3.0, 0.0)],
        "b": [TimedLevel(1.0, 0.0)],
    }
    assert within_latency(levels, 3.5) == {"a": 0, "b": 0}
    assert within_latency(levels, 4.0) == {"a": 2, "b": 0}


def test_a_budget_of_exactly_the_fastest_levels_is_met() -> None:
    levels = {"a": [TimedLevel(2.0, 0.0), TimedLevel(1.0, 3.0), TimedLevel(1.0, 2.0)]}
    assert within_latency(levels, 1.0) == {"a": 2}


def test_a_time_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(TargetError, match=r"1\.5 ms cannot be reached.* take 3 ms"):
        within_latency({"a": [TimedLevel(0.003, 0.0), TimedLevel(0.004, 0.0)]}, 0.0015)
