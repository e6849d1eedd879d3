"""Simulated annealing finds the best allocation of small instances, and is never worse than equal sparsities."""

import itertools
import math
from typing import Any

import pytest
import tiny_models
import torch
from oneshot_models import Snapshot, batches, logits, trained
from transformers import PreTrainedModel

from hf_compress import (
    AnnealingConfig,
    ConfigError,
    TargetError,
    dimension_groups,
    make_example_inputs,
    profile,
    shrink,
    simulated_annealing,
)
from hf_compress.instruments.gate import unit_weights

DATA = batches(2, 16)
FFN = [f"bert.encoder.layer.{i}.ffn" for i in range(4)]
LEVEL = 8


def deep_bert() -> PreTrainedModel:
    """Four layers of 32 feed-forward units, each worth another amount."""
    model = tiny_models.bert(num_hidden_layers=4, intermediate_size=32).eval()
    with torch.no_grad():
        for layer, scale in zip(model.bert.encoder.layer, (0.2, 1.5, 0.05, 0.7), strict=True):
            layer.output.dense.weight.mul_(scale)
    return model


def likeness(dense: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Any:
    """Return how little the outputs of a model differ from the dense one's, at most 0."""
    with torch.no_grad():
        expected = dense(**inputs).logits

    def evaluate(model: PreTrainedModel) -> float:
        return -float((model(**inputs).logits - expected).abs().mean())

    return evaluate


def without_units(model: PreTrainedModel, scores: dict[str, torch.Tensor], kept: tuple[int, ...]) -> PreTrainedModel:
    """The lowest scores of each layer go: their columns are zero."""
    copied = type(model)(model.config).eval()
    copied.load_state_dict(model.state_dict())
    for layer, score, count in zip(copied.bert.encoder.layer, scores.values(), kept, strict=True):
        gone = score.argsort()[: len(score) - count]
        layer.output.dense.weight.data[:, gone] = 0
    return copied


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_what_trying_all_finds(seed: int) -> None:
    dense = deep_bert()
    evaluate = likeness(dense, make_example_inputs(dense, batch_size=4))
    groups = {group.name: group for group in dimension_groups(dense)}
    scores = {name: unit_weights(dense, groups[name]).norm(dim=1) for name in FFN}
    levels = range(LEVEL, 33, LEVEL)
    with torch.no_grad():
        every = {
            kept: evaluate(without_units(dense, scores, kept))
            for kept in itertools.product(levels, repeat=4)
            if sum(kept) == 64
        }
    assert len(every) > 20
    best = max(every, key=lambda kept: every[kept])
    settings = AnnealingConfig(num_iterations=150, temperature=0.02, seed=seed)
    found = simulated_annealing(dense, evaluate, {"ffn": 0.5}, multiple_of=LEVEL, annealing=settings)
    assert found.start_score == pytest.approx(every[16, 16, 16, 16], abs=1e-6)
    assert found.score == pytest.approx(every[best], abs=1e-6) and found.score > found.start_score
    assert [int(found.masks[name].sum()) for name in FFN] == list(best)
    for name in FFN:
        assert scores[name][found.masks[name]].min() > scores[name][~found.masks[name]].max()
        assert found.sparsities[name] == 1 - int(found.masks[name].sum()) / 32


@pytest.mark.parametrize("seed", range(4))
def test_the_overall_sparsity_stays_and_the_best_is_kept(seed: int) -> None:
    """Scores that say nothing: each allocation has one by chance."""
    model = deep_bert()
    calls: list[bool] = []

    def evaluate(masked: PreTrainedModel) -> float:
        calls.append(masked.training or torch.is_grad_enabled())
        return math.sin(12.9898 * len(calls) + seed)

    settings = AnnealingConfig(num_iterations=30, temperature=1.0, seed=seed)
    found = simulated_annealing(model, evaluate, {"heads": 0.25, "ffn": 0.6}, annealing=settings)
    scores = [trial.score for trial in found.history]
    assert len(scores) == 30 and len(calls) == 1 + len({tuple(each.sparsities.values()) for each in found.history})
    assert not any(calls)
    assert found.score == max([found.start_score, *scores]) >= found.start_score
    groups = {group.name: group for group in dimension_groups(model)}
    for sparsities in (found.sparsities, *(trial.sparsities for trial in found.history)):
        for kind, total, left in (("heads", 16, 12), ("ffn", 128, 51)):
            mine = {name: each for name, each in sparsities.items() if groups[name].kind == kind}
            kept = sum((1 - each) * groups[name].num_units for name, each in mine.items())
            assert sum(groups[name].num_units for name in mine) == total and kept == pytest.approx(left)


def test_worse_is_accepted_when_it_is_hot_and_not_when_it_is_cold() -> None:
    model = deep_bert()
    evaluate = likeness(model, make_example_inputs(model))
    worse: dict[str, list[bool]] = {}
    for name, temperature in (("hot", 1e6), ("cold", 1e-9)):
        settings = AnnealingConfig(num_iterations=25, temperature=temperature, cooling=1.0)
        found = simulated_annealing(model, evaluate, {"ffn": 0.5}, annealing=settings)
        before, worse[name] = found.start_score, []
        for trial in found.history:
            if trial.score < before:
                worse[name].append(trial.accepted)
            else:
                assert trial.accepted
            before = trial.score if trial.accepted else before
    assert len(worse["hot"]) > 5 and all(worse["hot"])
    assert len(worse["cold"]) > 5 and not any(worse["cold"])


def test_equal_seeds_give_equal_results_and_the_model_stays_as_it_was() -> None:
    model = trained("bert").train()
    before = Snapshot(model)
    evaluate = likeness(trained("bert"), {key: value for key, value in DATA[0].items() if key != "labels"})
    settings = AnnealingConfig(num_iterations=10)
    first, second = (
        simulated_annealing(model, evaluate, {"heads": 0.5, "ffn": 0.5}, annealing=settings) for _ in range(2)
    )
    assert first.history == second.history
    other = AnnealingConfig(num_iterations=10, seed=1)
    third = simulated_annealing(model, evaluate, {"heads": 0.5, "ffn": 0.5}, annealing=other)
    assert third.history != first.history
    before.check()


def test_what_is_evaluated_is_what_shrink_returns() -> None:
    model = trained("bert")
    seen: list[torch.Tensor] = []

    def evaluate(masked: PreTrainedModel) -> float:
        seen.append(logits(masked, DATA))
        return float(len(seen))

    settings = AnnealingConfig(num_iterations=5)
    found = simulated_annealing(model, evaluate, {"heads": 0.5, "ffn": 0.5}, annealing=settings)
    small = shrink(model, found.masks)
    torch.testing.assert_close(logits(small, DATA), seen[int(found.score) - 1], rtol=1e-5, atol=1e-5)
    assert f"score {found.score:.6g}" in found.summary()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_budget_of_parameters_is_met(family: str) -> None:
    model = tiny_models.ZOO[family](num_hidden_layers=3, intermediate_size=64).eval()
    evaluate = likeness(model, make_example_inputs(model))
    settings = AnnealingConfig(num_iterations=8)
    budget = int(0.7 * profile(model).parameters)
    found = simulated_annealing(model, evaluate, ["heads", "ffn"], target_params=budget, annealing=settings)
    left = profile(shrink(model, found.masks)).parameters
    assert 0.98 * budget <= left <= budget
    assert len({tuple(trial.sparsities.values()) for trial in found.history}) > 3


def test_what_is_left_out_stays_whole() -> None:
    model = deep_bert()
    evaluate = likeness(model, make_example_inputs(model))
    settings = AnnealingConfig(num_iterations=10)
    exclude = [r"layer\.[03]\."]
    found = simulated_annealing(
        model, evaluate, {"ffn": 0.5}, annealing=settings, exclude=exclude, max_layer_sparsity=0.6, min_units=14
    )
    assert set(found.masks) == set(FFN[1:3])
    for trial in found.history:
        assert max(trial.sparsities.values()) <= 1 - 14 / 32


def test_scores_that_are_given_decide_within_groups() -> None:
    model = deep_bert()
    scores = {name: torch.arange(32).flip(0) % 16 for name in FFN}
    evaluate = likeness(model, make_example_inputs(model))
    settings = AnnealingConfig(num_iterations=5)
    found = simulated_annealing(model, evaluate, {"ffn": 0.5}, criterion=scores, annealing=settings)
    for name in FFN:
        assert scores[name][found.masks[name]].min() >= scores[name][~found.masks[name]].max()


def test_settings_round_trip() -> None:
    settings = AnnealingConfig(num_iterations=7, temperature=2.5, cooling=0.5, perturbation=0.1, seed=3)
    assert AnnealingConfig.from_dict(settings.to_dict()) == settings


def test_another_module_is_refused() -> None:
    with pytest.raises(TargetError, match="simulated_annealing: got Linear; allowed: a transformers PreTrainedModel"):
        simulated_annealing(torch.nn.Linear(2, 2), lambda model: 0.0, {"ffn": 0.5})


GOOD = {"structures": {"ffn": 0.5}, "evaluate": lambda model: 1.0}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"evaluate": lambda model: math.nan}, TargetError, "evaluate returned nan; allowed: a finite number"),
        ({"evaluate": lambda model: {"accuracy": 1}}, TargetError, "evaluate returned a dict; allowed: a number"),
        ({"evaluate": None}, ConfigError, "simulated_annealing: evaluate is a NoneType; allowed: a function"),
        ({"annealing": 5}, ConfigError, "simulated_annealing: annealing is a int; allowed: an AnnealingConfig"),
        ({"criterion": "taylor"}, ConfigError, "'taylor' reads something else; .*'l2'"),
        ({"criterion": {FFN[0]: torch.ones(32)}}, ConfigError, rf"criterion\['{FFN[1]}'\] is missing"),
        ({"criterion": {name: torch.ones(31) for name in FFN}}, ConfigError, r"has shape \(31,\)"),
        ({"criterion": {name: torch.full((32,), math.nan) for name in FFN}}, ConfigError, "not finite"),
        ({"structures": {"weights": 0.5}}, ConfigError, "structures has 'weights'"),
        ({"structures": ["ffn"]}, ConfigError, "structures: got"),
        ({"structures": {"ffn": 0.9}, "max_layer_sparsity": 0.95, "min_units": 8}, TargetError, "highest sparsity"),
        ({"structures": {"hidden": 0.5}}, TargetError, "only one way to share out what stays of hidden"),
        ({"exclude": ["nothing"]}, TargetError, "'nothing' matches no dimension group"),
        ({"annealing": {"cooling": 0.0}}, ConfigError, r"cooling: got 0.0; allowed: a number in \(0, 1\]"),
        ({"annealing": {"temperature": math.inf}}, ConfigError, "temperature: got inf"),
        ({"annealing": {"perturbation": 2}}, ConfigError, "perturbation: got 2"),
        ({"annealing": {"seed": 0.5}}, ConfigError, "seed: got 0.5"),
        ({"annealing": {"num_iterations": 0}}, ConfigError, "num_iterations: got 0"),
    ],
)
def test_what_cannot_be_searched_is_said(changes: Any, error: type[Exception], message: str) -> None:
    model = deep_bert()
    before = Snapshot(model)
    settings = {**GOOD, **changes}
    with pytest.raises(error, match=message):
        if isinstance(settings.get("annealing"), dict):
            settings["annealing"] = AnnealingConfig(**settings["annealing"])
        simulated_annealing(model, settings.pop("evaluate"), settings.pop("structures"), **settings)
    before.check()
