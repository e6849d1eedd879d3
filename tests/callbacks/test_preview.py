"""A preview says what training will do, fails where training would, and leaves no trace."""

import copy
import json
import random
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ResNetConfig, ResNetForImageClassification

from hf_compress import (
    CompressionError,
    ConfigError,
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    PruningRule,
    QuantizationCallback,
    QuantizationConfig,
    ShrinkError,
    TargetError,
    TrainingError,
    make_example_inputs,
    preview,
    profile,
    shrink,
)
from hf_compress.callbacks.preview import Previewable
from hf_compress.instruments.attach import attachment_of

SIZES = {"heads": 0.5, "ffn": 0.75}


@pytest.fixture
def callbacks(tiny_bert: Any) -> Any:
    """``callbacks()``: one of each kind, new every time."""

    def make() -> list[Any]:
        return [
            PruningCallback(PruningConfig(structures=SIZES, begin=2, end=6, update_every=2)),
            DistillationCallback(DistillationConfig(), teacher=tiny_bert(seed=1)),
            QuantizationCallback(QuantizationConfig(begin=3)),
        ]

    return make


@pytest.fixture
def trainer(tiny_bert: Any, classification_data: Any, make_trainer: Any, callbacks: Any) -> Any:
    return make_trainer(tiny_bert(), classification_data(32), callbacks(), max_steps=8)


def test_it_says_what_then_happens(trainer: Any) -> None:
    told = preview(trainer)
    facts = told.sections["pruning"]
    assert told.total_steps == 8
    assert facts["share of the removal by step"] == {"step 4": 0.875, "step 6": 1.0}
    assert facts["steps after it"] == 2
    how = {"criterion": "taylor", "allocation": "global"}
    assert facts["heads"] == {"units": 8, "removed": 4, "layers": 2, **how}
    trainer.train()
    small = shrink(trainer)
    assert facts["parameters"] == trainer.model.num_parameters()
    # Units of one kind have the same number of weights in every layer, so it does not matter which go.
    assert facts["parameters after shrink"] == small.num_parameters()
    quantization = told.sections["quantization"]
    assert quantization["layers"] == 13
    assert quantization["begins at step"] == 3
    assert quantization["bytes as integers"] < quantization["bytes of these weights"] / 3
    assert told.sections["distillation"]["logits loss of the first batch"] > 0


@pytest.mark.parametrize("structures", [{"layers": 0.5}, {"layers": 0.5, "heads": 0.5, "ffn": 0.5}])
def test_layers_that_go_are_counted(
    structures: Any, tiny_bert: Any, classification_data: Any, make_trainer: Any
) -> None:
    """In the preview and in logs; what else is pruned in a layer that goes counts once."""
    model = tiny_bert(num_hidden_layers=4)
    callback = PruningCallback(PruningConfig(structures=structures, criterion="l2", begin=0, end=2))
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    trainer = make_trainer(model, classification_data(16), [callback], max_steps=3, **logs)
    inputs = make_example_inputs(model)
    dense = profile(model, inputs, latency=False)

    def check(parameters: float, flops_kept: float, small: Any) -> None:
        found = profile(small, inputs, latency=False)
        assert parameters == found.parameters < dense.parameters
        assert flops_kept == pytest.approx(found.flops / dense.flops, abs=1e-4)

    facts = preview(trainer).sections["pruning"]
    check(facts["parameters after shrink"], facts["operations kept"], shrink(model, callback.trial))
    with pytest.warns(UserWarning, match="gates stay on the model"):
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "parameters" in entry][-1]
    check(log["parameters"], log["flops_kept"], shrink(trainer))


SOFT = {"structures": ["heads", "ffn"], "criterion": "movement", "options": {"mode": "soft", "regular_scale": 10.0}}


def test_a_method_that_decides_itself_how_much_goes(
    tiny_bert: Any, classification_data: Any, make_trainer: Any
) -> None:
    callback = PruningCallback(PruningConfig(**SOFT, begin=1, end=3, update_every=1))
    trainer = make_trainer(tiny_bert(), classification_data(16), [callback], max_steps=4)
    facts = preview(trainer).sections["pruning"]
    assert facts["heads"]["removed"] == facts["ffn"]["removed"] == "found by the method"
    assert facts["parameters"] == facts["parameters after shrink"] == trainer.model.num_parameters()
    assert "the method decides itself" in facts["trial"] and callback.trial is None


def test_a_part_of_it_may_be_decided_by_the_method(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    soft = PruningRule(match=("heads",), structures=["heads"], criterion="movement", options=SOFT["options"])
    config = PruningConfig(structures={"heads": 0.5, "ffn": 0.5}, begin=1, end=3, update_every=1, rules=(soft,))
    trainer = make_trainer(tiny_bert(), classification_data(16), [PruningCallback(config)], max_steps=4)
    facts = preview(trainer).sections["pruning"]
    assert facts["parameters after shrink"] < facts["parameters"]
    assert "a copy was shrunk" in facts["trial"]


def test_nothing_to_remove_is_still_an_error(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    callback = PruningCallback(PruningConfig(structures={"ffn": 0.0}, begin=1, end=3, update_every=1))
    with pytest.raises(ShrinkError, match="nothing would change"):
        preview(make_trainer(tiny_bert(), classification_data(16), [callback], max_steps=4))


def test_it_prints_and_is_plain_data(trainer: Any) -> None:
    told = preview(trainer)
    text = str(told)
    assert text.startswith("optimizer steps: 8\npruning\n")
    assert "teacher: BertForSequenceClassification" in text
    assert json.loads(json.dumps(told.to_dict()))["total_steps"] == 8


def test_each_callback_tells_its_own_part(trainer: Any) -> None:
    found = trainer.callback_handler.callbacks
    parts = [callback.preview(trainer) for callback in found if isinstance(callback, Previewable)]
    assert [list(part.sections) for part in parts] == [["pruning"], ["distillation"], ["quantization"]]


def test_it_leaves_no_trace(tiny_bert: Any, classification_data: Any, make_trainer: Any, callbacks: Any) -> None:
    results = []
    for ask in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        trainer = make_trainer(tiny_bert(), classification_data(32), callbacks(), max_steps=8)
        before = copy.deepcopy(trainer.model.state_dict())
        if ask:
            preview(trainer)
            assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
            assert not any(attachment_of(module) for module in trainer.model.modules())
            assert not trainer.model._forward_hooks
            assert trainer.accelerator._dataloaders == []
            assert trainer.model.training
        states = (torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))
        trainer.train()
        results.append((states, trainer.model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], tensor) for name, tensor in results[1][1].items())


def test_statistics_of_norms_are_given_back(make_trainer: Any) -> None:
    """BatchNorm averages over the batches that it sees in training mode."""

    def resnet(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 3}
        return ResNetForImageClassification(ResNetConfig(**sizes))

    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]
    model = resnet(0).train()
    model.resnet.embedder.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    told = preview(make_trainer(model, data, [DistillationCallback(DistillationConfig(), resnet(1))]))
    assert told.sections["distillation"]["logits loss of the first batch"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_steps_are_counted_as_the_trainer_does(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    """Ten examples in batches of four, two of them per step, two and a half epochs."""
    callback = PruningCallback(PruningConfig(structures={"heads": 0.5}, begin=0, end=1))
    trainer = make_trainer(
        tiny_bert(), classification_data(10), [callback], num_train_epochs=2.5, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    told = preview(trainer).total_steps
    trainer.train()
    assert told == trainer.state.max_steps == trainer.state.global_step


FAILURES: dict[str, tuple[type[CompressionError], str, Any]] = {
    "window": (ConfigError, "window of steps", lambda: PruningCallback(PruningConfig(structures=SIZES, end=99))),
    "pattern": (TargetError, "matches no dimension group", lambda: PruningCallback(
        PruningConfig(structures=SIZES, exclude=("nothing",)))),
    "begin": (ConfigError, "nothing would be trained", lambda: QuantizationCallback(QuantizationConfig(begin=99))),
    "teacher": (TrainingError, "cannot be loaded", lambda: DistillationCallback(
        DistillationConfig(), teacher="/no/such/folder")),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_it_fails_as_training_would(case: str, tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    error, message, make = FAILURES[case]
    trainer = make_trainer(tiny_bert(), classification_data(16), [make()], max_steps=8)
    with pytest.raises(error, match=message):
        preview(trainer)
    assert not any(attachment_of(module) for module in trainer.model.modules())
    with pytest.raises(error, match=message):
        trainer.train()


def test_a_result_that_shrink_would_refuse_is_known_before_training(trainer: Any, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ShrinkError("differs from the masked one")

    monkeypatch.setattr("hf_compress.callbacks.pruning.shrink", refuse)
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        preview(trainer)
    assert not any(attachment_of(module) for module in trainer.model.modules())


def test_it_comes_before_training(trainer: Any) -> None:
    trainer.train()
    with pytest.raises(TrainingError, match=r"Ask before trainer.train\(\)"):
        preview(trainer)
    assert shrink(trainer).num_parameters() < trainer.model.num_parameters()


def test_a_trainer_without_callbacks_has_nothing_to_tell(
    tiny_bert: Any, classification_data: Any, make_trainer: Any
) -> None:
    with pytest.raises(TrainingError, match="no compression callback"):
        preview(make_trainer(tiny_bert(), classification_data(8), [], max_steps=1))


def test_adapters_are_seen_merged(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    model = tiny_bert()
    size = model.num_parameters()
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
    callback = PruningCallback(PruningConfig(structures=SIZES))
    facts = preview(make_trainer(adapted, classification_data(16), [callback], max_steps=20)).sections["pruning"]
    assert facts["parameters"] == size > facts["parameters after shrink"]
