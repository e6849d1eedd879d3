"""Steps that change in training: what ranges are observed, what is learned, when."""

import pytest
import torch
from quantized_models import SETTINGS
from training_runs import same
from transformers import TrainerCallback

from hf_compress import QuantizationCallback, QuantizationConfig
from hf_compress.callbacks.state import read_state
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.quantize import attached_quantizers
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer

DENSE = "bert.encoder.layer.0.output.dense"


class Inputs(TrainerCallback):
    """Keeps the least and the largest input of a layer in every optimizer step, and the quantizer's range after it."""

    def __init__(self, name: str = DENSE) -> None:
        self.name = name
        self.extremes: list[tuple[float, float]] = []
        self.ranges: list[tuple[float, float]] = []
        self._now: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_submodule(self.name).register_forward_pre_hook(
            lambda module, args: self._now.append(args[0].detach())
        )

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.extremes.append((min(float(x.min()) for x in self._now), max(float(x.max()) for x in self._now)))
        self._now.clear()
        for layer in attached_quantizers(model).layers:
            if layer.name == self.name and layer.inputs.observer.state:
                self.ranges.append(tuple(float(each) for each in layer.inputs.observer.range()))


def callback(**config) -> QuantizationCallback:
    return QuantizationCallback(QuantizationConfig(**config))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_a_range_is_the_moving_average_of_whole_optimizer_steps(
    checkpointing, tiny_bert, classification_data, make_trainer
) -> None:
    """Micro-batches count into one update, and so do layers that run twice under activation checkpointing."""
    inputs = Inputs()
    options = {"observer": "ema", "observer_options": {"momentum": 0.5}}
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 4}
    quantize = callback(scheme="int8_static", inputs=options)
    trainer = make_trainer(
        tiny_bert(), classification_data(16), [quantize, inputs], gradient_checkpointing=checkpointing, **args
    )
    trainer.train()
    low, high = inputs.extremes[0]
    for step, (least, largest) in enumerate(inputs.extremes):
        if step:
            low, high = 0.5 * low + 0.5 * least, 0.5 * high + 0.5 * largest
        assert inputs.ranges[step] == pytest.approx((low, high), rel=1e-5)


def test_ranges_are_watched_before_quantization_begins_and_left_alone_once_frozen(
    tiny_bert, classification_data, make_trainer
) -> None:
    inputs = Inputs()
    quantize = callback(scheme="int8_static", observe=1, begin=3, freeze=5)
    trainer = make_trainer(tiny_bert(), classification_data(32), [quantize, inputs], max_steps=7)
    trainer.train()
    assert len(inputs.ranges) == 6  # of steps 1 to 6
    assert len(set(inputs.ranges)) == 4
    assert inputs.ranges[3] == inputs.ranges[4] == inputs.ranges[5]


def test_watching_alone_changes_no_training(tiny_bert, classification_data, make_trainer) -> None:
    data = classification_data(16)
    plain, watched = tiny_bert(), tiny_bert()
    weights = {}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                weights[id(model)] = {name: each.clone() for name, each in model.state_dict().items()}

    make_trainer(plain, data, [Stop()], max_steps=4).train()
    quantize = callback(scheme="int8_static", observe=0, begin=3)
    make_trainer(watched, data, [quantize, Stop()], max_steps=4).train()
    assert same(weights[id(plain)], weights[id(watched)])


def test_learned_steps_belong_to_nobody_else_and_follow_their_gradients(
    tiny_bert, classification_data, make_trainer
) -> None:
    """With Adam, a first step moves every learned step by its learning rate, relative to what it was."""
    before: dict[str, torch.Tensor] = {}

    class Before(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for layer in attached_quantizers(model).layers:
                before[layer.name] = layer.weights.learned["step"].detach().clone()

    model = tiny_bert()
    quantize = callback(method="lsq", weights={"num_bits": 4}, options={"learning_rate": 0.01})
    trainer = make_trainer(model, classification_data(), [quantize, Before()], max_steps=1)
    trainer.train()
    layers = attached_quantizers(model).layers
    assert len(layers) == len(before) == 13
    for layer in layers:
        moved = layer.weights.learned["step"].detach() / before[layer.name] - 1
        assert torch.allclose(moved.abs(), torch.full_like(moved, 0.01), rtol=0.05)
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not any(id(each) in in_optimizer for layer in layers for each in layer.weights.learned.values())
    assert not any("step" in name for name in model.state_dict())


def test_learned_steps_of_inputs_begin_with_the_first_step(tiny_bert, classification_data, make_trainer) -> None:
    seen: list[torch.Tensor] = []
    model = tiny_bert()
    model.get_submodule(DENSE).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    settings = {**SETTINGS["lsq"], "options": {"learning_rate": 1e-9}}
    make_trainer(model, classification_data(), [callback(**settings)], max_steps=2).train()
    (layer,) = (each for each in attached_quantizers(model).layers if each.name == DENSE)
    assert isinstance(layer.inputs, LearnedQuantizer)
    expected = 2 * seen[0].abs().mean() / 127**0.5
    assert layer.inputs.learned["step"].item() == pytest.approx(float(expected), rel=2e-3)  # counted in bins


def test_learned_offsets_end_on_the_grid(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    settings = {**SETTINGS["lsq_plus"], "options": {"learning_rate": 0.05}}
    make_trainer(model, classification_data(), [callback(**settings)], max_steps=5).train()
    for layer in attached_quantizers(model).layers:
        scale, zero_point = layer.inputs.parameters()
        assert layer.inputs.learned["offset"].item() == pytest.approx(float(-zero_point * scale), rel=1e-6)


def test_binary_latent_weights_stay_where_they_get_gradients(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert(initializer_range=1.0)
    make_trainer(model, classification_data(), [callback(**SETTINGS["bnn"])], max_steps=2, learning_rate=0.5).train()
    for layer in attached_quantizers(model).layers:
        assert layer.module.weight.abs().max() == 1
    assert model.classifier.weight.abs().max() > 1


def test_a_layer_that_nothing_reaches_is_named(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    model.unused = torch.nn.Linear(4, 4)
    trainer = make_trainer(model, classification_data(), [callback(scheme="int8_static", exclude=["classifier"])])
    with pytest.raises(TrainingError, match=r"1 tensors have no range.*'unused: inputs'.*Exclude"):
        trainer.train()
    assert attached_quantizers(model).layers == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"observe": 3, "begin": 2}, r"observe: 3 is step 3, after begin, which is step 2"),
        ({"freeze": 0.25, "begin": 0.5}, r"freeze: 0.25 is step 1; allowed: after begin, which is step 2"),
        ({"freeze": 4}, r"freeze: 4 is step 4; allowed: .* before the end, step 4"),
    ],
)
def test_moments_in_the_wrong_order_raise(settings, message, tiny_bert, classification_data, make_trainer) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(), [callback(scheme="int8_static", **settings)])
    with pytest.raises(ConfigError, match=message):
        trainer.train()


def test_a_checkpoint_holds_ranges(tiny_bert, classification_data, make_trainer, tmp_path) -> None:
    model = tiny_bert()
    trainer = make_trainer(
        model, classification_data(), [callback(scheme="int8_static")], save_strategy="steps", save_steps=4
    )
    trainer.train()
    stored = read_state(tmp_path / "run" / "checkpoint-4")["quantization"].tensors
    for layer in attached_quantizers(model).layers:
        assert isinstance(layer.inputs, ObservedQuantizer)
        assert torch.equal(stored[f"range/{layer.name}|inputs/low"], layer.inputs.observer.state["low"])
