"""Distillation under a real Trainer, against losses and gradients written out by hand."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from resumable import StopAt
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.config import DistillationConfig

ALPHA, TEMPERATURE = 0.7, 3.0
CONFIG = DistillationConfig(alpha=ALPHA, temperature=TEMPERATURE)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step and stops."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in data]) for name in data[0]}


def gradient_of(model: nn.Module, loss: Callable[[Any], Tensor]) -> Tensor:
    model = copy.deepcopy(model).train()
    loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """T^2 * sum of p * log(p / q), at every position."""
    q, p = (F.softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    return TEMPERATURE**2 * (p * (p / q).log()).sum(-1)


class ByHand:
    """Mean task and distillation loss over all labels of a data set."""

    def __init__(self, teacher: nn.Module, data: list[dict[str, Tensor]], shift: bool, smoothing: float = 0.0) -> None:
        self.batch, self.shift, self.smoothing = batch_of(data), shift, smoothing
        self.teacher = copy.deepcopy(teacher).eval()

    def pairs(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        logits, labels = model(**inputs).logits, self.batch["labels"]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits[labels != -100], labels[labels != -100]

    def task(self, model: nn.Module) -> Tensor:
        logits, labels = self.pairs(model)
        # The Trainer's smoothing spreads epsilon over all classes, as torch does.
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def mixed(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            theirs, _ = self.pairs(self.teacher)
        own, _ = self.pairs(model)
        return (1 - ALPHA) * self.task(model) + ALPHA * divergence(own, theirs).mean()


def mean_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` that does not look at the number of items."""
    return F.cross_entropy(outputs.logits, labels)


def sum_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` as the documentation wants it."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def number_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The same with a Python number, through which no gradient comes."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / int(num_items_in_batch)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", {}, {}),
    "bert with smoothed labels": ("bert", {"label_smoothing_factor": 0.2}, {}),
    "bert with mean loss function": ("bert", {}, {"compute_loss_func": mean_loss_func}),
    "bert with sum loss function": ("bert", {}, {"compute_loss_func": sum_loss_func}),
    "bert with loss function of a number": ("bert", {}, {"compute_loss_func": number_loss_func}),
    "llama": ("llama", {}, {}),
    "llama with smoothed labels": ("llama", {"label_smoothing_factor": 0.2}, {}),
}


@pytest.fixture
def setting(
    tiny_bert: Any, tiny_llama: Any, classification_data: Any, language_data: Any
) -> Callable[[str], tuple[Any, Any, Any]]:
    """``setting(kind)`` gives student, teacher and data; the student has no dropout, the teacher was left training."""

    def make(kind: str) -> tuple[Any, Any, Any]:
        if kind == "bert":
            return tiny_bert(**NO_DROPOUT), tiny_bert(seed=1, hidden_size=16).train(), classification_data()
        return tiny_llama(), tiny_llama(seed=1, hidden_size=16).train(), language_data()

    return make


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_one_of_the_loss_written_by_hand(
    make_trainer: Any, setting: Any, case: str, accumulation: int
) -> None:
    """Law 6: whatever scale the plain Trainer gives to this loss, the mixed loss has the same."""
    kind, args, options = CASES[case]
    student, teacher, data = setting(kind)
    by_hand = ByHand(teacher, data, kind == "llama", args.get("label_smoothing_factor", 0.0))
    args = {
        **args,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": len(data) // accumulation,
        "gradient_accumulation_steps": accumulation,
    }

    def trained(*callbacks: Any) -> Tensor:
        gradients = Gradients()
        make_trainer(copy.deepcopy(student), data, [*callbacks, gradients], trainer_options=options, **args).train()
        return gradients.flat

    plain, task = trained(), gradient_of(student, by_hand.task)
    scale = plain.norm() / task.norm()
    torch.testing.assert_close(plain, scale * task, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        trained(DistillationCallback(CONFIG, teacher)),
        scale * gradient_of(student, by_hand.mixed),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("case", CASES)
def test_logged_losses_add_up_to_the_loss(make_trainer: Any, setting: Any, case: str) -> None:
    kind, args, options = CASES[case]
    student, teacher, data = setting(kind)
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_options=options,
        logging_strategy="steps",
        logging_steps=3,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **args,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        expected = (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)
        assert entry["distillation_loss"] > 0


def test_logged_losses_are_free_of_the_loss_scale_of_mixed_precision(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    callbacks = [DistillationCallback(CONFIG, teacher)]
    trainer = make_trainer(student, data, callbacks, logging_strategy="steps", logging_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx((1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"])


def test_the_student_comes_to_agree_with_its_teacher(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    batch = batch_of(data)

    def distance() -> float:
        with torch.no_grad():
            return float(divergence(student.eval()(**batch).logits, teacher.eval()(**batch).logits).mean())

    before = distance()
    config = DistillationConfig(alpha=1.0, temperature=TEMPERATURE)
    make_trainer(student, data, [DistillationCallback(config, teacher)], max_steps=40).train()
    assert distance() < 0.1 * before


@pytest.mark.parametrize("case", ["bert", "bert with smoothed labels", "bert with sum loss function", "llama"])
def test_evaluation_measures_the_task_alone(make_trainer: Any, setting: Any, case: str) -> None:
    kind, args, options = CASES[case]
    student, teacher, data = setting(kind)
    by_hand = ByHand(teacher, data, kind == "llama", args.get("label_smoothing_factor", 0.0))
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_options=options,
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=len(data),
        **args,
    )
    trainer.train()
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    with torch.no_grad():
        assert logged == pytest.approx(float(by_hand.task(student.eval())), rel=1e-4)


@pytest.mark.parametrize(("training", "gradients"), [(True, False), (False, True)])
def test_other_calls_while_training_see_the_task_loss(
    make_trainer: Any, setting: Any, training: bool, gradients: bool
) -> None:
    """Such as a callback that measures something, or an analysis of the model by another callback."""
    student, teacher, data = setting("bert")
    by_hand = ByHand(teacher, data, shift=False)
    differences = []

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.train(training)
            with torch.set_grad_enabled(gradients):
                differences.append(float(model(**by_hand.batch).loss - by_hand.task(model)))

    make_trainer(student, data, [DistillationCallback(CONFIG, teacher), Measure()]).train()
    assert len(differences) == 4
    assert max(map(abs, differences)) < 1e-5


@pytest.mark.parametrize("function", [mean_loss_func, sum_loss_func])
def test_the_loss_is_computed_once_more_to_see_what_it_depends_on_and_then_as_always(
    make_trainer: Any, setting: Any, function: Any
) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return function(*args, **kwargs)

    student, teacher, data = setting("bert")
    callback = DistillationCallback(CONFIG, teacher)
    make_trainer(student, data, [callback], trainer_options={"compute_loss_func": counted}, max_steps=3).train()
    assert len(calls) == 1 + 3


def test_everything_is_given_back_after_training(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    teacher.bert.encoder.eval()
    teacher.classifier.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_options={"compute_loss_func": sum_loss_func},
        label_smoothing_factor=0.1,
    )
    smoother = trainer.label_smoother
    before = [value.clone() for value in teacher.state_dict().values()]
    trainer.train()
    assert trainer.label_smoother is smoother
    assert trainer.compute_loss_func is sum_loss_func
    assert "log" not in vars(trainer)
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    assert modes == [module.training for module in teacher.modules()]
    assert flags == [parameter.requires_grad for parameter in teacher.parameters()]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(map(torch.equal, before, teacher.state_dict().values()))


def test_checkpoints_are_those_of_the_plain_model_plus_our_state(
    make_trainer: Any, setting: Any, tmp_path: Path
) -> None:
    """Law 4; the teacher is nowhere."""
    listings = []
    for callbacks in ([], [DistillationCallback(CONFIG, setting("bert")[1])]):
        student, _, data = setting("bert")
        output = tmp_path / f"with_{len(callbacks)}"
        make_trainer(student, data, callbacks, save_strategy="steps", save_steps=2, output_dir=str(output)).train()
        folder = output / "checkpoint-4"
        weights = {name: value.shape for name, value in load_file(folder / "model.safetensors").items()}
        listings.append((weights, {path.name for path in folder.iterdir()}))
    (plain_weights, plain_files), (weights, files) = listings
    assert weights == plain_weights
    assert files - plain_files == {"hf_compress_state.safetensors", "hf_compress_state.json"}
    assert plain_files <= files


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_resumed_run_ends_where_a_straight_one_does(
    make_trainer: Any, tiny_bert: Any, setting: Any, tmp_path: Path, kind: str
) -> None:
    """Law 5, bit for bit, with dropout."""

    def run(output: str, *callbacks: Any, resume: bool = False) -> nn.Module:
        student, teacher, data = setting(kind)
        student = tiny_bert() if kind == "bert" else student
        trainer = make_trainer(
            student,
            data,
            [DistillationCallback(CONFIG, teacher), *callbacks],
            output_dir=str(tmp_path / output),
            save_strategy="steps",
            save_steps=1,
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return student

    straight = run("straight")
    run("resumed", StopAt(3))
    assert not (tmp_path / "resumed" / "checkpoint-4").exists()
    resumed = run("resumed", resume=True)
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_encoder_decoder_is_taught(make_trainer: Any, language_data: Any, smoothing: float) -> None:
    """The teacher gets what its decoder needs, whether the labels reach the model or not."""
    data = [{**example, "decoder_input_ids": example["input_ids"].roll(1)} for example in language_data()]
    student, teacher = tiny_models.t5(), tiny_models.t5()
    with torch.no_grad():
        teacher.shared.weight.mul_(1.5)
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        logging_strategy="steps",
        logging_steps=1,
        label_smoothing_factor=smoothing,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["distillation_loss"] > 0
    assert entry["loss"] == pytest.approx(
        (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"], rel=1e-4
    )


def test_adapters_are_taught(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    trainer = make_trainer(
        adapted, data, [DistillationCallback(CONFIG, teacher)], logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["distillation_loss"] > 0


@pytest.mark.parametrize(
    "args",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_training_options_keep_the_gradient(make_trainer: Any, setting: Any, args: dict[str, Any]) -> None:
    student, teacher, data = setting("llama")
    flats = []
    for extra in ({}, args):
        gradients = Gradients()
        callbacks = [DistillationCallback(CONFIG, teacher), gradients]
        make_trainer(copy.deepcopy(student), data, callbacks, max_steps=1, max_grad_norm=0.0, **extra).train()
        flats.append(gradients.flat)
    tolerance = 0.05 if "bf16" in args else 1e-5
    assert (flats[0] - flats[1]).norm() <= tolerance * flats[0].norm()
