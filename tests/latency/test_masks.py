import pytest
import tiny_models
import torch
from fake_timer import FakeTimer, weights_in_layers
from masked_models import prunable

from hf_compress import ConfigError, GraphError, TargetError, make_example_inputs, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import group_limits
from hf_compress.latency import masks as latency
from hf_compress.latency.masks import (
    fit_speedup,
    latency_masks,
    masks_within_latency,
    measure_speedup,
    tried_masks,
)
from hf_compress.latency.measure import measure_latency, shrunk_copy
from hf_compress.pruning.allocate import Layer

SIZES = {"intermediate_size": 96, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def bert():
    return tiny_models.bert(**SIZES)


@pytest.fixture(scope="module")
def graph(bert) -> ModelGraph:
    return ModelGraph(bert)


@pytest.fixture(scope="module")
def table(bert, graph):
    return measure_latency(bert, graph=graph, rounds=1, timer=FakeTimer(slowdown=[1.0]))


@pytest.fixture(scope="module")
def scores(graph) -> dict[str, torch.Tensor]:
    """A head has eight times the weights of a unit; later layers matter more."""
    generator = torch.Generator().manual_seed(0)
    groups = prunable(graph.groups, "heads", "ffn")
    weight = {"heads": 8.0, "ffn": 1.0}
    return {
        g.name: weight[g.kind] * (1 + (".2." in g.name)) * torch.rand(g.num_units, generator=generator) for g in groups
    }


def true_speedup(model, small) -> float:
    milliseconds = FakeTimer().milliseconds
    return milliseconds(weights_in_layers(model)) / milliseconds(weights_in_layers(small))


@pytest.mark.parametrize("target", [1.5, 2.0, 4.0])
def test_masks_give_the_speedup_once_shrunk(bert, table, scores, target) -> None:
    masks = latency_masks(bert, scores, target_speedup=target, table=table)
    found = true_speedup(bert, shrink(bert, masks))
    assert target * 0.999 <= found < target * 1.05
    kept = {name: float(scores[name][mask].mean()) for name, mask in masks.items() if mask.any()}
    gone = {name: float(scores[name][~mask].mean()) for name, mask in masks.items() if not mask.all()}
    assert all(kept[name] > gone[name] for name in kept.keys() & gone.keys())
    late = sum(int(mask.sum()) for name, mask in masks.items() if ".2." in name)
    assert late > max(sum(int(mask.sum()) for name, mask in masks.items() if f".{i}." in name) for i in (0, 1))


def test_a_target_in_milliseconds_is_the_same(bert, table, scores) -> None:
    by_ratio = latency_masks(bert, scores, target_speedup=2.5, table=table)
    by_time = latency_masks(bert, scores, target_latency_ms=table.predict({}) * 1000 / 2.5, table=table)
    assert all(torch.equal(mask, by_time[name]) for name, mask in by_ratio.items())


def test_groups_without_scores_stay_whole_and_limits_hold(bert, graph, table, scores) -> None:
    some = {name: score for name, score in scores.items() if name.endswith("ffn")}
    limits = group_limits([g for g in graph.groups if g.name in some], multiple_of=8, min_units=16)
    masks = latency_masks(bert, some, target_speedup=1.6, table=table, limits=limits)
    assert masks.keys() == some.keys()
    assert all(int(mask.sum()) % 8 == 0 and mask.sum() >= 16 for mask in masks.values())
    assert 1.6 <= true_speedup(bert, shrink(bert, masks)) < 1.7


def test_the_best_of_all_masks_is_found(graph, table) -> None:
    """Two groups of four heads: all 25 pairs of numbers, tried."""
    first, second = (g.name for g in prunable(graph.groups, "heads")[:2])
    scores = {first: torch.tensor([4.0, 3.0, 2.0, 1.0]), second: torch.tensor([9.0, 0.5, 0.4, 0.3])}
    limits = {name: Layer(num_units=len(score), min_units=0) for name, score in scores.items()}
    pairs = {(a, b): table.predict({first: a, second: b}) for a in range(5) for b in range(5)}
    lowest, head = pairs[0, 0], pairs[0, 1] - pairs[0, 0]
    for heads in range(9):
        seconds = lowest + (heads + 0.5) * head
        best = max(
            float(scores[first][:a].sum() + scores[second][:b].sum())
            for (a, b), took in pairs.items()
            if took <= seconds
        )
        masks = masks_within_latency(table, scores, limits, seconds)
        assert sum(float(scores[name][mask].sum()) for name, mask in masks.items()) == pytest.approx(best)


def test_many_levels_are_thinned_to_the_ends_and_evenly(monkeypatch, bert, table, scores) -> None:
    monkeypatch.setattr(latency, "MAX_LEVELS", 13)
    masks = latency_masks(bert, scores, target_speedup=2.0, table=table)
    widths = {int(mask.sum()) for name, mask in masks.items() if name.endswith("ffn")}
    assert widths <= {8 * i for i in range(13)}
    assert 2.0 <= true_speedup(bert, shrink(bert, masks)) < 2.2


def test_a_target_out_of_reach_says_what_is_in_reach(bert, table, scores) -> None:
    lowest = dict.fromkeys(scores, 0)
    fastest = table.predict({}) / table.predict(lowest)
    with pytest.raises(TargetError, match=rf"{fastest * 1.01:.2f} times as fast.*\({fastest:.2f} times\)"):
        latency_masks(bert, scores, target_speedup=fastest * 1.01, table=table)
    masks = latency_masks(bert, scores, target_speedup=fastest * 0.999, table=table)
    assert sum(int(mask.sum()) for mask in masks.values()) < 5


@pytest.mark.parametrize(
    "targets",
    [
        {},
        {"target_speedup": 2.0, "target_latency_ms": 3.0},
        {"target_speedup": -1.0},
        {"target_speedup": 1.0},
        {"target_latency_ms": 1e6},
    ],
)
def test_a_target_that_says_nothing_is_refused(bert, table, scores, targets) -> None:
    with pytest.raises(ConfigError, match="latency: "):
        latency_masks(bert, scores, table=table, **targets)


def test_scores_of_what_cannot_go_are_refused(bert, graph, table, scores) -> None:
    frozen = next(g for g in graph.groups if g.frozen is not None)
    with pytest.raises(TargetError, match="cannot lose units"):
        latency_masks(bert, {frozen.name: torch.ones(frozen.num_units)}, target_speedup=2.0, table=table)
    with pytest.raises(TargetError, match="no such group"):
        latency_masks(bert, {"nothing": torch.ones(3)}, target_speedup=2.0, table=table)
    hidden = prunable(graph.groups, "hidden")[0]
    with pytest.raises(ConfigError, match="was not measured"):
        latency_masks(bert, {hidden.name: torch.ones(hidden.num_units)}, target_speedup=2.0, table=table)


def test_a_table_of_other_inputs_is_refused(bert, table, scores) -> None:
    inputs = make_example_inputs(bert, batch_size=7)
    with pytest.raises(ConfigError, match="inputs: measured with"):
        latency_masks(bert, scores, target_speedup=2.0, table=table, example_inputs=inputs)


def test_a_speedup_is_the_median_of_ratios(bert, graph) -> None:
    small = shrunk_copy(bert, graph, {g.name: 1 for g in prunable(graph.groups, "ffn")})
    found = measure_speedup(bert, small, {}, rounds=6, timer=FakeTimer())
    assert found.ratio == pytest.approx(true_speedup(bert, small))
    assert found.seconds[0] / found.seconds[1] == pytest.approx(found.ratio)


def test_models_that_do_not_run_on_the_inputs_are_refused(bert) -> None:
    with pytest.raises(GraphError, match="failed on the example inputs"):
        measure_speedup(bert, bert, {"input_ids": torch.ones(1, 1000, dtype=torch.long)}, rounds=1)


def wrong_by(factor: float) -> FakeTimer:
    """A machine where small models take longer than the table says."""
    dense = weights_in_layers(tiny_models.bert(**SIZES))
    return FakeTimer(lambda w: (1.0 + w / 1000) * (factor if w < dense else 1.0))


@pytest.mark.parametrize("factor", [1.0, 1.3, 0.7])
def test_the_measured_speedup_is_the_one_asked_for_though_the_table_is_wrong(bert, table, scores, factor) -> None:
    timer = wrong_by(factor)
    fit = fit_speedup(bert, scores, 2.0, table=table, timer=timer, rounds=3)
    assert fit.measured.ratio == pytest.approx(2.0, rel=latency.CLOSE_ENOUGH)
    assert measure_speedup(bert, fit.model, {}, rounds=3, timer=timer).ratio == pytest.approx(fit.measured.ratio)
    assert len(fit.tried) <= latency.MAX_CORRECTIONS
    assert (len(fit.tried) == 1) == (factor == 1.0)
    assert fit.tried[0][0] == pytest.approx(2.0, rel=0.02)
    assert {name: int(mask.sum()) for name, mask in fit.masks.items()}.keys() == scores.keys()


@pytest.mark.parametrize("slow", [True, False])
def test_a_speedup_that_is_missed_is_an_error(bert, table, scores, slow) -> None:
    """Too fast is missed as well: it costs accuracy that nobody asked to give."""
    dense = weights_in_layers(bert)
    timer = FakeTimer(lambda w: 10.0 if w == dense else 10.0 / (1.7 if slow else 2.3))
    with pytest.raises(TargetError, match=r"asked for 2 times as fast, measured (1\.70|2\.30)"):
        fit_speedup(bert, scores, 2.0, table=table, timer=timer, rounds=3)


def chooser(graph, scores, table, target):
    seconds, limits = table.predict({}) / target, group_limits([g for g in graph.groups if g.name in scores])
    return lambda corrected: masks_within_latency(corrected, scores, limits, seconds)


def test_a_try_counts_though_the_corrected_table_says_that_the_target_is_out_of_reach(graph, table, scores) -> None:
    dense = table.predict({})
    target = dense / table.predict(dict.fromkeys(scores, 0)) * 0.98
    tries = tried_masks(
        table, dense, target, chooser(graph, scores, table, target), lambda kept: dense / table.predict(kept) / 1.06
    )
    assert len(tries.tried) == 1
    assert abs(tries.tried[0][1] / target - 1) < latency.TOLERANCE
    assert {name: int(mask.sum()) for name, mask in tries.closest.items()}.keys() == scores.keys()
    with pytest.raises(TargetError, match="cannot be reached"):
        tried_masks(tries.table, dense, target, chooser(graph, scores, table, target), lambda kept: target)


def test_a_disturbed_measurement_counts_less_and_less(graph, table, scores) -> None:
    """The table is right; the second measurement is off by 2.5, the others by a little in turns."""
    dense, noise = table.predict({}), iter([1.05, 2.5, 0.95, 1.05])
    tries = tried_masks(
        table,
        dense,
        2.0,
        chooser(graph, scores, table, 2.0),
        lambda kept: dense / table.predict(kept) / next(noise),
    )
    errors = [abs(measured / 2.0 - 1) for _, measured in tries.tried]
    assert len(errors) == latency.MAX_CORRECTIONS
    off = tries.table.predict({}) / dense
    assert off == pytest.approx((1.05 * 2.5 * 0.95 * 1.05) ** 0.25, rel=1e-6)
