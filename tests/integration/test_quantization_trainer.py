import math

import pytest
import tiny_models
import torch
from quantized_models import fake_quantized_modules, on_int8_grid
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_compress.callbacks.quantization import QuantizationCallback
from hf_compress.config import QuantizationConfig
from hf_compress.errors import ConfigError, TargetError, TrainingError
from hf_compress.instruments.fake_quantize import quantizable_layers


class Recorder(TrainerCallback):
    """Keeps the weights after every step and, if asked, stops."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.quantized: list[bool] = []
        self.stop_after = stop_after

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        self.quantized.append(bool(fake_quantized_modules(model)))
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_after


def callback(**config) -> QuantizationCallback:
    return QuantizationCallback(QuantizationConfig(**config))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_differs_from_plain_and_learns(tiny_bert, classification_data, make_trainer) -> None:
    data, plain, quantized = classification_data(), Recorder(), Recorder()
    make_trainer(tiny_bert(), data, [plain]).train()
    make_trainer(tiny_bert(), data, [callback(), quantized]).train()
    assert quantized.quantized == [True] * 4
    assert plain.quantized == [False] * 4
    assert not equal(plain.weights[0], quantized.weights[0])
    trainer = make_trainer(tiny_bert(), data, [callback()], max_steps=30)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_logs_say_how_coarse_the_grid_is(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    settings = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(model, classification_data(), [callback(begin=2)], max_steps=4, **settings)
    trainer.train()
    found = [entry.get("weight_rounding_error") for entry in trainer.state.log_history if "loss" in entry]
    assert found[:2] == [None, None]
    weights = [module.weight.detach() for module in quantizable_layers(model).values()]
    rounded = [on_int8_grid(weight) for weight in weights]
    errors = [(weight - grid).pow(2).sum() for weight, grid in zip(weights, rounded, strict=True)]
    error = (sum(errors) / sum(weight.pow(2).sum() for weight in weights)).sqrt()
    assert found[2:] == pytest.approx([float(error)] * 2, rel=1e-5)
    scales = [entry["largest_weight_scale"] for entry in trainer.state.log_history if "largest_weight_scale" in entry]
    assert scales == pytest.approx([max(float(w.abs().max()) for w in weights) / 127] * 2, rel=1e-2)


def test_evaluation_after_training_measures_the_quantized_model(tiny_bert, classification_data, make_trainer) -> None:
    quantize = callback()
    trainer = make_trainer(tiny_bert(), classification_data(), [quantize])
    trainer.train()
    quantized = trainer.evaluate()["eval_loss"]
    assert fake_quantized_modules(trainer.model) == list(quantizable_layers(trainer.model))
    assert trainer.evaluate()["eval_loss"] == quantized
    quantize.detach()
    assert fake_quantized_modules(trainer.model) == []
    plain = trainer.evaluate()["eval_loss"]
    assert 0 < abs(plain - quantized) < 0.1
    quantize.detach()  # twice is harmless


def test_checkpoints_and_saved_models_are_plain(tiny_bert, classification_data, make_trainer, tmp_path) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(), [callback()], save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    keys = tiny_bert().state_dict().keys()
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        assert load_file(folder / "model.safetensors").keys() == keys
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values())
    assert not hasattr(reloaded.config, "quantization_config")
    assert equal(reloaded.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("begin", [2, 0.5])
def test_a_late_start_leaves_the_steps_before_untouched(begin, tiny_bert, classification_data, make_trainer) -> None:
    plain, late = Recorder(), Recorder()
    make_trainer(tiny_bert(), classification_data(), [plain]).train()
    make_trainer(tiny_bert(), classification_data(), [callback(begin=begin), late]).train()
    assert late.quantized == [False, False, True, True]
    assert [equal(a, b) for a, b in zip(plain.weights, late.weights, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(("begin", "expected"), [(0, True), (1, False)])
def test_an_evaluation_before_the_first_step_sees_what_training_will(
    begin, expected, tiny_bert, classification_data, make_trainer
) -> None:
    seen = []

    class Watcher(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen.append(bool(fake_quantized_modules(model)))

    make_trainer(tiny_bert(), classification_data(), [callback(begin=begin), Watcher()], eval_on_start=True).train()
    assert seen == [expected]


@pytest.mark.parametrize("begin", [4, 1.0, 400])
def test_a_start_after_the_end_raises_before_training(begin, tiny_bert, classification_data, make_trainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(tiny_bert(), classification_data(), [callback(begin=begin), recorder])
    with pytest.raises(ConfigError, match=r"QuantizationConfig\.begin: .* the run has 4 optimizer steps"):
        trainer.train()
    assert recorder.weights == []
    assert fake_quantized_modules(trainer.model) == []


def test_stopping_before_the_start_raises(tiny_bert, classification_data, make_trainer) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(), [callback(begin=3), Recorder(stop_after=2)])
    with pytest.raises(TrainingError, match="never trained with quantization, which begins at step 3 of 4"):
        trainer.train()


def test_going_back_to_a_checkpoint_before_the_start_raises(tiny_bert, classification_data, make_trainer) -> None:
    scores = iter([1.0, 0.5, 0.4, 0.3])
    trainer = make_trainer(
        tiny_bert(), classification_data(), [callback(begin=2)], trainer_options={
            "compute_metrics": lambda _: {"score": next(scores)}
        },
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="load_best_model_at_end went back to a checkpoint before it"):
        trainer.train()
    assert fake_quantized_modules(trainer.model) == []


def test_the_best_checkpoint_after_the_start_is_fine(tiny_bert, classification_data, make_trainer) -> None:
    scores, recorder = iter([0.1, 0.2, 0.9, 0.3]), Recorder()
    trainer = make_trainer(
        tiny_bert(), classification_data(), [callback(begin=2), recorder], trainer_options={
            "compute_metrics": lambda _: {"score": next(scores)}
        },
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert equal(trainer.model.state_dict(), recorder.weights[2])
    assert fake_quantized_modules(trainer.model)


def test_training_again_starts_afresh(tiny_bert, classification_data, make_trainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(tiny_bert(), classification_data(), [callback(begin=2), recorder])
    trainer.train()
    trainer.train()
    assert recorder.quantized == [False, False, True, True] * 2
    assert fake_quantized_modules(trainer.model)


def test_a_second_callback_starts_from_the_weights_alone(tiny_bert, classification_data, make_trainer) -> None:
    first = make_trainer(tiny_bert(), classification_data(), [callback()])
    first.train()
    recorder = Recorder()
    second = make_trainer(first.model, classification_data(), [callback(begin=2), recorder])
    with pytest.warns(UserWarning, match="carried fake quantizers"):
        second.train()
    assert recorder.quantized == [False, False, True, True]


def test_a_model_without_such_layers_raises_before_training(make_trainer) -> None:
    recorder = Recorder()
    data = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 4
    trainer = make_trainer(tiny_models.gpt2(), data, [callback(targets=["convolution"]), recorder])
    with pytest.raises(TargetError, match="has no Conv1d or Conv2d"):
        trainer.train()
    assert recorder.weights == []


def test_gradient_checkpointing_gives_the_same_weights(tiny_bert, classification_data, make_trainer) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            classification_data(),
            [callback()],
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        results.append(trainer.model.state_dict())
    assert equal(*results)


def test_bf16_training_runs(tiny_bert, classification_data, make_trainer) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(), [callback()], bf16=True, max_steps=2)
    assert math.isfinite(trainer.train().training_loss)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_language_models_train_too(tiny_llama, language_data, make_trainer) -> None:
    trainer = make_trainer(tiny_llama(), language_data(), [callback()], max_steps=2)
    trainer.train()
    assert "lm_head" not in fake_quantized_modules(trainer.model)
    assert len(fake_quantized_modules(trainer.model)) == 2 * 7
