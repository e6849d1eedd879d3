"""A speed-up or a latency as the budget without training: measured, and an error if it is missed."""

from typing import Any

import pytest
import tiny_models
from fake_timer import FakeTimer, weights_in_layers
from oneshot_models import Snapshot, batches, prune, trained
from torch import nn

from hf_compress import ConfigError, PruningConfig, TargetError, make_example_inputs, shrink
from hf_compress.latency import budget
from hf_compress.latency.budget import LatencyBudget


def seconds_of(model: nn.Module) -> float:
    return 1e-3 + 1e-6 * weights_in_layers(model)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[Any]:
    """Time is that above; the inputs that were timed."""
    seen: list[Any] = []

    class Timer(FakeTimer):
        def __call__(self, models: Any, inputs: Any, rounds: int) -> Any:
            seen.append(inputs)
            return super().__call__(models, inputs, rounds)

    monkeypatch.setattr("hf_compress.latency.cache.default_directory", lambda: tmp_path / "tables")
    monkeypatch.setattr(budget, "time_in_turns", Timer())
    return seen


def config(**settings: Any) -> PruningConfig:
    return PruningConfig(structures=["heads", "ffn"], latency_shape=(2, 8), **{"criterion": "obs", **settings})


@pytest.mark.parametrize("criterion", ["l2", "obs", "kwon", "fisher"])
def test_a_speed_up_is_reached_as_measured(inputs: list[Any], criterion: str) -> None:
    model = trained("bert").train()
    dense = seconds_of(model)
    result = prune(model, batches(2), config(criterion=criterion, target_speedup=1.5))
    small = shrink(model, result.masks)
    assert result.measured is not None and result.measured.ratio == pytest.approx(1.5, rel=0.05)
    assert dense / seconds_of(small) == pytest.approx(result.measured.ratio, rel=1e-3)
    assert {tuple(each["input_ids"].shape) for each in inputs} == {(2, 8)}
    assert model.training


def test_a_latency_is_reached_with_the_inputs_that_are_given(inputs: list[Any]) -> None:
    model = trained("bert")
    example = make_example_inputs(model, batch_size=3, length=5)
    wanted = 0.7 * seconds_of(model)
    settings = PruningConfig(structures=["heads", "ffn"], criterion="l2", target_latency_ms=1000 * wanted)
    result = prune(model, batches(1), settings, example_inputs=example)
    assert result.measured is not None and result.measured.seconds[1] == pytest.approx(wanted, rel=0.05)
    assert {tuple(each["input_ids"].shape) for each in inputs} == {(3, 5)}


@pytest.mark.parametrize("ratio", [1.2, 1.8])
def test_a_speed_up_that_is_missed_is_an_error_and_leaves_the_model_as_it_was(
    inputs: list[Any], monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    class Measured:
        seconds = (ratio, 1.0)

    Measured.ratio = ratio  # type: ignore[attr-defined]
    monkeypatch.setattr(LatencyBudget, "measure", lambda self, small: Measured())
    model = trained("bert").train()
    before = Snapshot(model)
    with pytest.raises(TargetError, match=rf"asked for 1\.5, .*measured {ratio}0 .*more than 10%.*The model is as it"):
        prune(model, batches(2), config(target_speedup=1.5))
    before.check()


def test_more_than_the_dense_model_takes_is_refused_before_any_batch(inputs: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"target_latency_ms: 1e\+06 is no less than the .* ms of the dense model"):
        prune(trained("bert"), None, config(target_latency_ms=1e6))


def test_other_budgets_measure_nothing() -> None:
    settings = PruningConfig(structures=["heads", "ffn"], criterion="l2", target_params=0.85)
    assert prune(tiny_models.bert(), batches(1), settings).measured is None
