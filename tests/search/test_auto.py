"""AutoCompress: search, train, shrink, and again."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer

from hf_compress import (
    AnnealingConfig,
    ConfigError,
    PruningCallback,
    ShrinkError,
    TargetError,
    auto_compress,
)

QUICK = AnnealingConfig(num_iterations=6)


@pytest.fixture
def data(classification_data: Any) -> Any:
    return classification_data(32)


@pytest.fixture
def evaluate(data: Any) -> Any:
    inputs = {key: torch.stack([each[key] for each in data]) for key in data[0]}
    return lambda model: -float(model(**inputs).loss)


@pytest.fixture
def train(make_trainer: Any, data: Any) -> Any:
    """``train(model, callback)``; the configs that it was called with are in ``train.configs``."""

    def run(model: PreTrainedModel, callback: PruningCallback) -> Trainer:
        configs.append(callback.config)
        trainer = make_trainer(model, data, [callback], max_steps=6)
        trainer.train()
        return trainer

    configs: list[Any] = []
    run.configs = configs
    return run


def units(model: PreTrainedModel) -> dict[str, list[int]]:
    layers = model.bert.encoder.layer
    return {
        "heads": [layer.attention.self.query.out_features // 8 for layer in layers],
        "ffn": [layer.intermediate.dense.out_features for layer in layers],
    }


def test_each_iteration_prunes_what_was_found_and_the_sum_is_what_was_asked_for(
    tiny_bert, evaluate, train, tmp_path
) -> None:
    structures = {"heads": 0.5, "ffn": 0.75}
    result = auto_compress(
        tiny_bert(), evaluate, train, structures, num_iterations=2, annealing=QUICK, begin=1, end=4, update_every=1
    )
    left = units(result.model)
    assert sum(left["heads"]) == 4 and sum(left["ffn"]) == 24
    assert result.units == {"heads": (8, 4), "ffn": (96, 24)}
    first, second = result.searches
    kept = {name: int(mask.sum()) for name, mask in second.masks.items()}
    assert sum(int(mask.sum()) for name, mask in first.masks.items() if name.endswith("ffn")) == 48
    assert [kept[f"bert.encoder.layer.{i}.ffn"] for i in range(2)] == left["ffn"]
    for search in result.searches:
        assert search.score >= search.start_score
    for config, search in zip(train.configs, result.searches, strict=True):
        assert (config.criterion, config.begin, config.end) == ("admm", 1, 4)
        (rule,) = (rule for rule in config.rules if "ffn" in rule.structures)
        assert rule.structures == {"ffn": search.sparsities["bert.encoder.layer.0.ffn"]}
        assert config.structures["ffn"] == search.sparsities["bert.encoder.layer.1.ffn"]
    assert "ffn: 24 of 96 units left" in result.summary()

    result.model.save_pretrained(tmp_path / "small")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    inputs = {"input_ids": torch.arange(3, 13).view(2, 5)}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, result.model(**inputs).logits)


def test_groups_that_are_none_any_more_count(tiny_bert, train, data) -> None:
    """A layer that is left with one head is no group; the others lose what is missing."""
    model = tiny_bert(num_hidden_layers=3).eval()
    model.bert.encoder.layer[1].attention.output.dense.weight.data.mul_(1e-3)  # its heads hardly matter
    ids = torch.stack([each["input_ids"] for each in data])
    with torch.no_grad():
        dense = model(input_ids=ids).logits

    def evaluate(model: PreTrainedModel) -> float:
        return -float((model(input_ids=ids).logits - dense).abs().mean())

    result = auto_compress(
        model,
        evaluate,
        train,
        {"heads": 0.5, "ffn": 0.5},
        num_iterations=3,
        criterion="l2",
        annealing=AnnealingConfig(num_iterations=40, perturbation=1.0),
        multiple_of=4,
        end=4,
    )
    left = units(result.model)
    assert sum(left["heads"]) == 6 and left["heads"][1] == 1
    assert abs(sum(left["ffn"]) - 72) <= 2 and all(count % 4 == 0 for count in left["ffn"])
    searched = [{name for name in each.masks if name.endswith("heads")} for each in result.searches]
    assert len(searched[0]) == 3 and "bert.encoder.layer.1.attention.heads" not in searched[-1]
    assert result.units["heads"] == (12, 6)


def test_tied_groups_are_pruned_together(tiny_bert, evaluate, train) -> None:
    """Groups whose sizes are one integer in forward code keep equal shares."""
    result = auto_compress(
        tiny_bert(),
        evaluate,
        train,
        {"head_dim": 0.5},
        num_iterations=2,
        criterion="l2",
        annealing=QUICK,
        end=4,
    )
    assert result.units["head_dim"] == (32, 16)
    (rule,) = train.configs[0].rules
    (pattern,) = rule.match
    matched = [name for name in result.searches[0].masks if re.search(pattern, name)]
    assert len(matched) == 2
    first, second = (result.searches[0].sparsities[name] for name in matched)
    assert first == second == rule.structures["head_dim"]


def test_iterations_without_a_whole_unit_are_left_out(tiny_bert, evaluate, train) -> None:
    result = auto_compress(tiny_bert(), evaluate, train, {"heads": 0.25}, num_iterations=6, annealing=QUICK, end=4)
    assert sum(units(result.model)["heads"]) == 6
    assert len(result.searches) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_iterations": 0}, ConfigError, "num_iterations=0; allowed: an int >= 1"),
        ({"beginn": 1}, ConfigError, "unknown setting 'beginn' of a training; closest match: 'begin'"),
        ({"target_params": 0.5}, ConfigError, "unknown setting 'target_params'"),
        ({"structures": ["heads"]}, ConfigError, "structures: got"),
        ({"structures": {"weights": 0.5}}, ConfigError, "auto_compress: structures has 'weights'"),
        ({"structures": {"heads": 0.0}}, TargetError, "only one way to share out"),
        ({"structures": {"heads": 0.9}}, TargetError, r"structures\['heads'\]: sparsity 0.9"),
        ({"search_criterion": "admm"}, ConfigError, "'admm' reads something else"),
        ({"options": {"rhoo": 1}}, ConfigError, "'rhoo'"),
        ({"train": None}, ConfigError, "train is a NoneType; allowed: a function"),
        ({"annealing": {}}, ConfigError, "auto_compress: annealing is a dict; allowed: an AnnealingConfig"),
        ({"train": lambda model, callback: None}, ConfigError, "train returned a NoneType"),
    ],
)
def test_what_cannot_be_done_is_said(tiny_bert, evaluate, train, changes, error, message) -> None:
    settings = {"structures": {"heads": 0.5}, "train": train, "annealing": QUICK, **changes}
    with pytest.raises(error, match=message):
        auto_compress(tiny_bert(), evaluate, settings.pop("train"), settings.pop("structures"), **settings)
    assert train.configs == []


def test_a_trainer_that_did_not_train_is_refused(tiny_bert, evaluate, make_trainer, data) -> None:
    def idle(model: PreTrainedModel, callback: PruningCallback) -> Trainer:
        return make_trainer(model, data, [callback])

    def without(model: PreTrainedModel, callback: PruningCallback) -> Trainer:
        return make_trainer(model, data)

    for train, error, message in (
        (idle, ShrinkError, "training has not finished"),
        (without, ConfigError, "without the callback"),
    ):
        with pytest.raises(error, match=message):
            auto_compress(tiny_bert(), evaluate, train, {"heads": 0.5}, annealing=QUICK)
