"""Budgets of the whole model in a real Trainer: parameters, operations, measured time."""


import pytest
import torch
from fake_timer import FakeTimer, weights_in_layers

from hf_compress import (
    ConfigError,
    PruningCallback,
    PruningConfig,
    PruningRule,
    TargetError,
    make_example_inputs,
    preview,
    profile,
    shrink,
)
from hf_compress.graph.model import ModelGraph
from hf_compress.latency import budget
from hf_compress.latency.budget import LatencyBudget

HEAD = 1048
"""Weights of one head of the tiny model."""

FFN = [f"bert.encoder.layer.{i}.ffn" for i in range(2)]


def config(**changes):
    return PruningConfig(**{"structures": ["heads", "ffn"], "begin": 1, "end": 5, "update_every": 1, **changes})


@pytest.fixture
def train(tiny_bert, classification_data, make_trainer):
    def run(settings, **options):
        callback = PruningCallback(settings)
        trainer = make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=7, **options)
        trainer.train()
        return trainer, callback

    return run


@pytest.mark.parametrize("criterion", ["taylor", "l2", "movement", "slim", "random"])
def test_parameters(train, criterion) -> None:
    trainer, _ = train(config(target_params=0.8, criterion=criterion), logging_steps=1, logging_strategy="steps")
    whole, left = trainer.model.num_parameters(), shrink(trainer).num_parameters()
    assert 0.8 * whole - HEAD < left <= 0.8 * whole  # the coarsest step that is left
    logged = [entry["parameters"] for entry in trainer.state.log_history if "parameters" in entry]
    assert logged[0] == whole and logged[-1] == left
    if criterion != "slim":
        assert logged == sorted(logged, reverse=True) and len(set(logged)) >= 3
    assert "ffn_sparsity" in trainer.state.log_history[0] and "heads_sparsity" in trainer.state.log_history[0]


def test_a_number_of_parameters(train, tiny_bert) -> None:
    wanted = tiny_bert().num_parameters() - 5_000
    trainer, _ = train(config(target_params=wanted))
    assert wanted - 150 <= shrink(trainer).num_parameters() <= wanted


@pytest.mark.parametrize("beyond", [0, 10**9])
@pytest.mark.parametrize("target", ["target_params", "target_flops"])
def test_a_budget_that_the_dense_model_meets_is_refused(
    tiny_bert, classification_data, make_trainer, target, beyond
) -> None:
    costs = ModelGraph(tiny_bert()).costs
    dense = costs.parameters({}) if target == "target_params" else costs.flops({})
    message = f"{target}: {dense + beyond:,} is no less than the {dense:,} of the dense model"
    for go in (preview, lambda trainer: trainer.train()):
        callback = PruningCallback(config(**{target: dense + beyond}))
        with pytest.raises(ConfigError, match=message):
            go(make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=7))


def test_operations(train) -> None:
    trainer, _ = train(config(target_flops=0.6))
    inputs = make_example_inputs(trainer.model)
    whole, left = (profile(model, inputs, latency=False).flops for model in (trainer.model, shrink(trainer)))
    assert 0.57 <= left / whole <= 0.6


def test_limits_hold_under_a_budget_and_rules_may_change_them(train) -> None:
    rules = (PruningRule(match=(r"layer\.0\.ffn",), max_layer_sparsity=0.25),)
    _, callback = train(config(target_params=0.86, multiple_of=8, rules=rules, structures=["ffn"]))
    assert sorted(callback._pruner.pools[0].kinds["ffn"]) == FFN  # logs count the layers of all rules
    first, second = (int(callback.masks()[name].sum()) for name in FFN)
    assert first >= 36 and first % 8 == 0 and second % 8 == 0 and second < 48


def test_a_budget_that_the_limits_forbid_says_what_is_possible(train) -> None:
    with pytest.raises(TargetError, match=r"budget: .* cannot be reached: with the fewest units .* the cost is"):
        train(config(target_params=0.1))


def test_the_preview_says_what_is_left(tiny_bert, classification_data, make_trainer) -> None:
    callback = PruningCallback(config(target_params=0.8))
    facts = preview(make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=7)).sections["pruning"]
    assert 0.8 * facts["parameters"] - HEAD < facts["parameters after shrink"] <= 0.8 * facts["parameters"]
    assert facts["ffn"]["allocation"] == "budget"


def seconds_of(model) -> float:
    """A device on which time is the number of weights in the layers, and something for the rest."""
    return 1e-3 + 1e-6 * weights_in_layers(model)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Measures with the time above instead of a clock; it can be made slower where there are more weights."""
    monkeypatch.setattr("hf_compress.latency.cache.default_directory", lambda: tmp_path / "tables")
    factors = {"weights": 1.0}
    timer = FakeTimer(lambda weights: 1.0 + 1e-3 * weights * factors["weights"])
    monkeypatch.setattr(budget, "time_in_turns", timer)
    return factors


def test_a_speed_up_is_reached_as_measured(train, device) -> None:
    trainer, callback = train(config(target_speedup=1.5))
    assert callback.measured.ratio == pytest.approx(1.5, rel=0.05)
    small = shrink(trainer)
    assert seconds_of(trainer.model) / seconds_of(small) == pytest.approx(callback.measured.ratio, rel=1e-3)


def test_a_speed_up_out_of_reach_is_an_error_at_once(device, tiny_bert, classification_data, make_trainer) -> None:
    """The message names what the config asks for in the end, not what the schedule asks for in its middle."""
    callback = PruningCallback(config(target_speedup=1000.0))
    trainer = make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=7)
    with pytest.raises(TargetError, match=r"\(1000\.00 times as fast as whole\) cannot be reached"):
        trainer.train()
    assert trainer.state.global_step <= 2  # where the cubic schedule, which begins at 1, first asks for something


def test_a_latency_is_reached_as_measured(train, device, tiny_bert) -> None:
    wanted = 0.7 * seconds_of(tiny_bert())
    _, callback = train(config(target_latency_ms=1000 * wanted))
    assert callback.measured.seconds[1] == pytest.approx(wanted, rel=0.05)


def test_a_speed_up_that_is_missed_is_an_error_and_the_model_is_not_lost(train, device, monkeypatch) -> None:
    monkeypatch.setattr(LatencyBudget, "measure", lambda self, small: MEASURED)
    seen = []
    monkeypatch.setattr(PruningCallback, "__init__", spy(PruningCallback.__init__, seen))
    with pytest.raises(TargetError, match=r"target_speedup: asked for 1\.5, .*measured 1\.20.*off by more than 10%"):
        train(config(target_speedup=1.5))
    assert seen[0].measured is MEASURED
    assert not all(mask.all() for mask in seen[0].masks().values())


def spy(original, seen):
    def init(self, *args, **kwargs):
        seen.append(self)
        original(self, *args, **kwargs)

    return init


class Measured:
    ratio = 1.2
    seconds = (1.2, 1.0)


MEASURED = Measured()


def test_more_than_the_dense_model_takes_removes_nothing(train, device) -> None:
    with pytest.raises(ConfigError, match=r"target_latency_ms: 1e\+06 is no less than the .* ms of the dense model"):
        train(config(target_latency_ms=1e6))


def test_a_resumed_run_measures_nothing_new(train, device, tmp_path, tiny_bert, classification_data, make_trainer):
    """The table, corrections included, comes from the checkpoint: other times would be other masks."""
    settings = config(target_speedup=1.5)
    options = {"save_strategy": "steps", "save_steps": 3}
    straight, first = train(settings, **options)
    checkpoint = next((tmp_path / "run").glob("checkpoint-3"))
    device["weights"] = 3.0
    for table in (tmp_path / "tables").glob("*"):
        table.unlink()
    callback = PruningCallback(settings)
    trainer = make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=7, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(mask, first.masks()[name]) for name, mask in callback.masks().items())
    pairs = zip(trainer.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
