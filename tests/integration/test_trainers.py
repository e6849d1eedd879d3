"""Every kind of Trainer, with each callback alone and with all three: they train, and what comes out is theirs."""

import copy
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch.nn.functional as F
from training_runs import (
    METHODS,
    NUM_EXAMPLES,
    Recorder,
    cases_of_methods,
    compression,
    instrumented,
    neutral,
    same,
    slow_unless,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_compress import PruningCallback, QuantizationCallback, shrink


def check_result(trainer: Any, data: Any) -> None:
    """Law 3 of training: the Trainer's own evaluation is the one of the shrunk model, and nothing is left behind."""
    callbacks = trainer.callback_handler.callbacks
    for callback in callbacks:
        if isinstance(callback, QuantizationCallback):
            assert instrumented(trainer.model)
            quantized = trainer.evaluate(data)["eval_loss"]
            callback.detach()
            assert 0 < abs(trainer.evaluate(data)["eval_loss"] - quantized) < 0.2 * quantized
    assert not instrumented(trainer.model)
    assert not trainer.model._forward_hooks
    assert "log" not in vars(trainer)
    own = trainer.evaluate(data)["eval_loss"]
    if any(isinstance(callback, PruningCallback) for callback in callbacks):
        small = shrink(trainer)
        assert small.num_parameters() < 0.9 * trainer.model.num_parameters()
        plain = type(trainer)(small, trainer.args, eval_dataset=data, data_collator=trainer.data_collator)
        plain.label_smoother, plain.compute_loss_func = trainer.label_smoother, trainer.compute_loss_func
        assert plain.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-5)


class UsesOutputs(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = 2 * outputs.loss
        return (loss, outputs) if return_outputs else loss


class CallsSuper(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return F.cross_entropy(outputs.logits, labels)


KINDS: dict[str, tuple[type[Trainer], dict[str, Any], dict[str, Any]]] = {
    "Trainer": (Trainer, {}, {}),
    "outputs.loss": (UsesOutputs, {}, {}),
    "super": (CallsSuper, {}, {}),
    "own loss": (OwnLoss, {}, {}),
    "smoothed labels": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "loss function": (Trainer, {}, {"compute_loss_func": mean_loss}),
    "smoothed labels under super": (CallsSuper, {"label_smoothing_factor": 0.1}, {}),
}
CASES = [
    slow_unless(method == "all" or (kind, method) == ("own loss", "pruning"), kind, method, name=f"{kind}, {method}")
    for kind in KINDS
    for method in METHODS
    # Distillation has nothing to mix its loss into there; that it says so is tested in test_distillation_guards.py.
    if kind != "own loss" or method not in ("distillation", "all")
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_kinds_of_trainer(tiny_bert: Any, classification_data: Any, make_trainer: Any, kind: str, method: str) -> None:
    """Evaluated before, while and after it trains."""
    trainer_class, args, options = KINDS[kind]
    data = classification_data(NUM_EXAMPLES)
    callbacks = compression(METHODS[method], tiny_bert(seed=1), begin=1)
    trainer = make_trainer(
        tiny_bert(),
        data,
        callbacks,
        trainer_class=trainer_class,
        trainer_options=options,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=2,
        **args,
    )
    before = trainer.evaluate()["eval_loss"]
    assert np.array_equal(trainer.predict(data).predictions, trainer.predict(data).predictions)
    trainer.train()
    during = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(during) == 3
    assert during[0] == before != during[1]
    assert trainer.evaluate()["eval_loss"] == during[2]
    check_result(trainer, data)


@cases_of_methods("all")
def test_seq2seq_trainer_generates_before_while_and_after(classification_data: Any, tmp_path: Any, method: str) -> None:
    data = [
        {"input_ids": example["input_ids"], "labels": example["input_ids"][:5]} for example in classification_data(8)
    ]
    model = tiny_models.bart()
    lengths = []

    def metrics(prediction: Any) -> dict[str, float]:
        lengths.append(prediction.predictions.shape[1])
        return {"tokens": float((prediction.predictions > 0).sum())}

    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        predict_with_generate=True,
        generation_max_length=7,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    callbacks = compression(METHODS[method], copy.deepcopy(model))
    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks, compute_metrics=metrics
    )
    before = trainer.predict(data).predictions
    trainer.train()
    assert len(lengths) == 3
    after = trainer.predict(data)
    assert after.predictions.shape == before.shape
    assert after.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    trainer.compute_metrics = None
    check_result(trainer, data)
    if method in ("pruning", "all"):
        small = shrink(trainer)
        own = trainer.predict(data).predictions
        assert np.array_equal(Seq2SeqTrainer(small, args, eval_dataset=data).predict(data).predictions, own)


@cases_of_methods("all")
def test_training_twice(tiny_bert: Any, classification_data: Any, make_trainer: Any, method: str) -> None:
    """The second run starts from the model that the first one left, masked and all, with the same optimizer."""
    data = classification_data(NUM_EXAMPLES)
    callbacks = compression(METHODS[method], tiny_bert(seed=1), begin=2)
    recorder = Recorder()
    trainer = make_trainer(tiny_bert(), data, [*callbacks, recorder])
    trainer.train()
    after_first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert len(recorder.weights) == 8
    assert not same(recorder.weights[4], after_first)
    check_result(trainer, data)


def test_training_twice_is_training_twice(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    """Law 1 over two runs of one Trainer."""
    finals = []
    for callbacks in ([], neutral(("pruning",), 4)):
        recorder = Recorder()
        trainer = make_trainer(tiny_bert(), classification_data(NUM_EXAMPLES), [*callbacks, recorder])
        trainer.train()
        trainer.train()
        finals.append(recorder.weights)
    assert len(finals[0]) == 8
    assert all(map(same, *finals))


class RunsOut(Trainer):
    """Runs out of memory after the forward pass of one micro-batch, with gradients of the one before in place."""

    at = 2

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training:
            self.at -= 1
            if self.at == 0:
                raise RuntimeError("CUDA out of memory.")
        return loss


OUT_OF_MEMORY = {
    "trainer_class": RunsOut,
    "auto_find_batch_size": True,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
}


@cases_of_methods("all")
def test_finding_a_batch_size(tiny_bert: Any, classification_data: Any, make_trainer: Any, method: str) -> None:
    """Labels are smoothed, so that the attempt that failed leaves inputs for a loss that never was computed."""
    data = classification_data(NUM_EXAMPLES)
    callbacks = compression(METHODS[method], tiny_bert(seed=1))
    trainer = make_trainer(tiny_bert(), data, callbacks, label_smoothing_factor=0.1, **OUT_OF_MEMORY)
    trainer.train()
    assert trainer._train_batch_size < 4
    assert trainer.state.global_step == 4
    check_result(trainer, data)


@pytest.mark.slow
def test_finding_a_batch_size_is_neutral(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    """Law 1: nothing of the attempt that failed is left in gates or weights; the first step's scores tell."""
    runs = []
    for callbacks in ([], neutral(("pruning", "quantization"), 4)):
        recorder = Recorder()
        data = classification_data(NUM_EXAMPLES)
        make_trainer(tiny_bert(), data, [*callbacks, recorder], **OUT_OF_MEMORY).train()
        runs.append(recorder.weights)
    assert len(runs[0]) == len(runs[1]) == 4
    assert all(map(same, runs[0][:3], runs[1][:3]))


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.models: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.models.append(model)


@cases_of_methods("all")
def test_models_from_model_init(tiny_bert: Any, classification_data: Any, make_trainer: Any, method: str) -> None:
    """Every run has a model of its own; the one before is left alone and plain."""
    data, watch = classification_data(NUM_EXAMPLES), Watch()
    callbacks = compression(METHODS[method], tiny_bert(seed=1))
    trainer = make_trainer(None, data, [*callbacks, watch], trainer_options={"model_init": lambda: tiny_bert()})
    trainer.train()
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    earlier, later = watch.models
    assert earlier is not later and later is trainer.model
    assert not instrumented(earlier) and not earlier._forward_hooks
    assert same(first, earlier.state_dict())
    assert same(first, later.state_dict())  # same seed, same run
    check_result(trainer, data)
