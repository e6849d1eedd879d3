import math

import pytest
import tiny_models
import torch
from fake_timer import FakeTimer, weights_in_layers
from masked_models import outputs, prunable, random_masks

from hf_compress import ConfigError, TargetError, make_example_inputs, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.gate import Gate
from hf_compress.instruments.limits import group_limits
from hf_compress.latency.measure import (
    ROUNDS_OF_TOTALS,
    TOGETHER,
    measure_latency,
    shrunk_copy,
)


def random_counts(graph: ModelGraph, seed: int) -> dict[str, int]:
    masks = random_masks(prunable(graph.groups, "heads", "ffn"), seed)
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.fixture(scope="module")
def bert():
    return tiny_models.bert()


@pytest.fixture(scope="module")
def graph(bert) -> ModelGraph:
    return ModelGraph(bert)


def seconds_of(model, graph, kept, timer, slowdown: float = 1.0) -> float:
    return timer.milliseconds(weights_in_layers(shrunk_copy(model, graph, kept))) * slowdown / 1000


def test_a_noisy_machine_changes_nothing_where_parts_add_up(bert, graph) -> None:
    timer = FakeTimer()
    table = measure_latency(bert, graph=graph, rounds=3, timer=timer)
    for seed in range(10):
        kept = random_counts(graph, seed)
        expected = seconds_of(bert, graph, kept, timer, sorted(timer.slowdown)[1])  # the median
        assert table.predict(kept) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("power", [0.7, 1.25])
def test_whole_models_correct_the_sum_of_parts(bert, graph, power) -> None:
    """Caches make large models slower than their parts, overheads make them faster."""
    timer = FakeTimer(lambda weights: 0.1 + (weights / 1000) ** power, slowdown=[1.0])
    table = measure_latency(bert, graph=graph, rounds=1, timer=timer)
    assert table.predict({}) == pytest.approx(seconds_of(bert, graph, {}, timer), rel=1e-6)
    of_totals, of_parts = [], []
    for kept in (random_counts(graph, seed) for seed in range(20)):
        measured = seconds_of(bert, graph, kept, timer)
        of_totals.append(abs(math.log(table.predict(kept) / measured)))
        of_parts.append(abs(math.log(table.sum_of_parts(kept) / measured)))
    assert max(of_totals) < 0.1
    assert max(of_parts) > 0.15


def test_identical_layers_share_one_curve_and_its_measurement(bert, graph) -> None:
    timer = FakeTimer()
    table = measure_latency(bert, graph=graph, rounds=2, timer=timer)
    assert [len(curve.members) for curve in table.curves] == [bert.config.num_hidden_layers] * 2
    heads, ffn = table.curves
    assert heads.kept == tuple(range(bert.config.num_attention_heads + 1))
    assert ffn.kept[0] == 0 and ffn.kept[-1] == bert.config.intermediate_size
    steps = [b / a for a, b in zip(ffn.kept[1:], ffn.kept[2:], strict=False) if a > 10]
    assert max(steps) < 1.4
    measured = len(heads.kept) + len(ffn.kept) - 2
    turns, turns_of_totals = -(-measured // TOGETHER), 2  # totals are those of eight models
    assert timer.num_models == measured + 8 + turns + turns_of_totals
    assert timer.calls == 2 * turns + 2 * ROUNDS_OF_TOTALS * turns_of_totals


def test_widths_are_multiples(bert, graph) -> None:
    table = measure_latency(bert, graph=graph, rounds=1, multiple_of=4, timer=FakeTimer(), structures=["ffn"])
    (ffn,) = table.curves
    assert all(width % 4 == 0 for width in ffn.kept)
    assert len(ffn.kept) > 4


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2", "vit"])
def test_the_real_timer_measures_real_models(name) -> None:
    model = getattr(tiny_models, name)()
    inputs = make_example_inputs(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = measure_latency(model.train(), inputs, rounds=1)
    assert 0 < table.predict({}) < 60
    assert all(part >= 0 for curve in table.curves for part in curve.seconds)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_structures_that_differ_have_curves_of_their_own() -> None:
    """T5's decoder attends to itself and to the encoder, whose text has another length."""
    model = tiny_models.t5()
    inputs = make_example_inputs(model)
    for name in [name for name in inputs if name.startswith("decoder_")]:
        inputs[name] = inputs[name][:, :3]
    table = measure_latency(model, inputs, structures=["heads"], rounds=1, timer=FakeTimer())
    kinds = [{member[0].split(".")[-2] for member in curve.members} for curve in table.curves]
    assert len(table.curves) >= 3, kinds


def test_a_shrunk_copy_computes_what_shrink_gives_and_shares_the_rest(bert, graph) -> None:
    kept = random_counts(graph, 1)
    copy = shrunk_copy(bert, graph, kept)
    masks = {g.name: torch.arange(g.num_units) < kept[g.name] for g in graph.groups if kept.get(g.name) is not None}
    small = shrink(bert, masks)
    inputs = make_example_inputs(bert)
    for a, b in zip(outputs(copy, inputs), outputs(small, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    words = "bert.embeddings.word_embeddings.weight"
    assert copy.get_parameter(words).data_ptr() == bert.get_parameter(words).data_ptr()
    assert copy.get_parameter(words) is not bert.get_parameter(words)


def test_gates_are_not_timed(bert, graph) -> None:
    group = prunable(graph.groups, "ffn")[0]
    gate = Gate(group, bert, needs_gradient=False)
    gate.set_mask(torch.zeros(group.num_units, dtype=torch.bool))
    try:
        copy = shrunk_copy(bert, graph, {})
    finally:
        gate.remove()
    inputs = make_example_inputs(bert)
    assert torch.equal(outputs(copy, inputs)[0], outputs(bert, inputs)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structures": ["hidden"]}, "allowed: some of"),
        ({"structures": []}, "allowed: some of"),
        ({"rounds": 0}, "rounds=0"),
        ({"multiple_of": 1.5}, "multiple_of=1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(bert, graph, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_latency(bert, graph=graph, timer=FakeTimer(), **settings)


def test_a_model_without_such_structures_is_refused(bert, graph, monkeypatch) -> None:
    monkeypatch.setattr(graph, "groups", [g for g in graph.groups if g.kind == "hidden"])
    with pytest.raises(TargetError, match="none of"):
        measure_latency(bert, graph=graph, timer=FakeTimer())


def test_limits_are_those_of_the_groups_and_no_looser(graph) -> None:
    groups = prunable(graph.groups, "heads", "ffn")
    plain, asked = group_limits(groups), group_limits(groups, min_units=1, multiple_of=8)
    for group in groups:
        assert plain[group.name].min_units == group.min_units == 0
        assert asked[group.name].min_units == 1
        assert asked[group.name].multiple_of == (8 if group.kind == "ffn" else 1)
