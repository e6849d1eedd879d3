"""Gradients of feature distillation in a real Trainer, against those of a Trainer that computes the loss by hand."""

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from features_by_hand import Lesson, config, examples, models, trainer_by_hand
from torch import Tensor
from torch.nn.functional import cross_entropy
from training_runs import Recorder, as_on_a_gpu, distance
from transformers import TrainerCallback

from hf_compress import DistillationCallback

PER_ITEM = ("llama", "vit")
"""Models whose task loss is a sum divided by num_items_in_batch."""

SAME = ((0, 0), (1, 1))
DEEP = {"num_hidden_layers": 4}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "bert, same": ("bert", {"loss": "hidden_mse"}, {}, SAME),
    "bert, uniform": ("bert", {"loss": "hidden_mse", "layers": "uniform"}, DEEP, ((0, 1), (1, 3))),
    "bert, last": ("bert", {"loss": "hidden_mse", "layers": "last"}, DEEP, ((1, 3),)),
    "bert, mapping": ("bert", {"loss": "hidden_mse", "layers": {0: 2, -1: 0}}, DEEP, ((0, 2), (1, 0))),
    "bert, attention": ("bert", {"loss": "attention_kl"}, {}, SAME),
    "bert, relations": ("bert", {"loss": "relations", "options": {"relation_heads": 2}}, {}, SAME),
    "llama": ("llama", {"loss": "hidden_mse"}, {}, SAME),
    "llama, attention": ("llama", {"loss": "attention_kl", "layers": {1: 0}}, {}, ((1, 0),)),
    "t5": ("t5", {"loss": "hidden_mse"}, {}, SAME),
    "bart": ("bart", {"loss": "hidden_mse"}, {}, SAME),
    "bart, attention": ("bart", {"loss": "attention_kl"}, {}, SAME),
    "vit": ("vit", {"loss": "hidden_mse"}, {}, SAME),
    "vit, attention": ("vit", {"loss": "attention_kl"}, {}, SAME),
}


def gradients(make_trainer: Any, student: Any, data: Any, callbacks: Any = (), **args: Any) -> Recorder:
    recorder = Recorder()
    make_trainer(copy.deepcopy(student), data, [*callbacks, recorder], **{"max_grad_norm": 0.0, **args}).train()
    return recorder


def check(actual: Recorder, expected: Recorder, tolerance: float = 1e-4) -> None:
    assert len(actual.gradients) == len(expected.gradients) > 0
    for ours, theirs in zip(actual.gradients, expected.gradients, strict=True):
        # Parameters behind the last features get zeros from one and nothing from the other.
        there = {name: gradient for name, gradient in theirs.items() if name in ours}
        assert distance(ours, there) < tolerance
        assert all(not theirs[name].any() for name in set(theirs) - set(ours))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_loss_written_by_hand(make_trainer: Any, case: str) -> None:
    """Law 6: batches of 3, 3 and 2 in windows of 2 and 1, for as many steps as make an epoch and a half."""
    kind, settings, deeper, pairs = CASES[case]
    student, teacher = models(kind, teacher=deeper)
    lesson = Lesson(kind, settings["loss"], copy.deepcopy(teacher), pairs)
    by_hand = trainer_by_hand(lesson, per_item=kind in PER_ITEM)
    args = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-3}
    data = examples(kind)
    expected = gradients(make_trainer, student, data, trainer_class=by_hand, **args)
    check(gradients(make_trainer, student, data, [DistillationCallback(config(**settings), teacher)], **args), expected)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, smoothing: float = 0.0) -> Tensor:
    """A ``compute_loss_func`` as the documentation wants it."""
    flat, wanted = outputs.logits.flatten(0, -2), labels.flatten()
    return cross_entropy(flat, wanted, reduction="sum", label_smoothing=smoothing) / num_items_in_batch


@pytest.mark.parametrize("kind", ["bert", "bart"])
@pytest.mark.parametrize("outside", ["label smoothing", "compute_loss_func"])
def test_a_loss_computed_outside_the_model_is_mixed_the_same(make_trainer: Any, kind: str, outside: str) -> None:
    """The decoder's padding is known from the labels, which the model does not get there."""
    student, teacher = models(kind)
    data = examples(kind)
    if kind == "bart":
        for example in data:
            example["decoder_input_ids"] = example["labels"].roll(1).clamp(min=0)
    smoothing = outside == "label smoothing"
    args = {"label_smoothing_factor": 0.2} if smoothing else {}
    options = {} if smoothing else {"compute_loss_func": summed}
    args |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    lesson = Lesson(kind, "hidden_mse", copy.deepcopy(teacher), SAME)
    task = partial(summed, smoothing=0.2) if smoothing else summed
    by_hand = trainer_by_hand(lesson, per_item=True, task=task)
    expected = gradients(make_trainer, student, data, trainer_class=by_hand, trainer_options=options, **args)
    callbacks = [DistillationCallback(config("hidden_mse"), teacher)]
    check(gradients(make_trainer, student, data, callbacks, trainer_options=options, **args), expected)


@pytest.mark.parametrize("layers", ["same", "uniform"])
def test_projections_start_from_least_squares_and_are_trained(make_trainer: Any, layers: str) -> None:
    """Their steps are those of ``torch.optim.Adam``."""
    deeper = DEEP if layers == "uniform" else {}
    student, teacher = models("bert", teacher={**deeper, "hidden_size": 48})
    data = examples("bert")
    pairs = SAME if layers == "same" else ((0, 1), (1, 3))
    lesson = Lesson("bert", "hidden_mse", copy.deepcopy(teacher), pairs)
    lesson.maps = {f"{i}": each.requires_grad_() for i, each in fitted(student, teacher, data, pairs).items()}
    optimizer = torch.optim.Adam(lesson.maps.values(), lr=0.01)

    class Step(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()

    args = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3}  # the fit is on all data
    expected = gradients(make_trainer, student, data, [Step()], trainer_class=trainer_by_hand(lesson), **args)
    settings = config("hidden_mse", layers=layers, projection="always", learning_rate=0.01)
    check(gradients(make_trainer, student, data, [DistillationCallback(settings, teacher)], **args), expected, 1e-3)


def fitted(student: Any, teacher: Any, data: Any, pairs: Any) -> dict[int, Tensor]:
    """Least squares on all positions that are no padding, with the ridge that makes it unique."""
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        own, theirs = (model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    found = {}
    for i, j in pairs:
        x, y = own[i][keep].double(), theirs[j][keep].double()
        ridge = 1e-3 * x.square().sum(0).mean()
        stacked = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1])])
        found[i] = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(x.shape[1], y.shape[1])])).solution.float()
    return found


REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("loss", "args"),
    [
        *itertools.product(["hidden_mse", "attention_kl"], [{"bf16": True}, {"fp16": True}]),
        *itertools.product(["hidden_mse", "attention_kl"], [{"activation_checkpointing": True}]),
        ("hidden_mse", REENTRANT),
    ],
    ids=str,
)
def test_training_options_keep_the_gradient(make_trainer: Any, loss: str, args: dict[str, Any]) -> None:
    student, teacher = models("llama")
    settings, data = config(loss), examples("llama")
    runs = []
    for extra in ({}, args):
        recorder, callback = Recorder(), DistillationCallback(settings, teacher)
        all_args = {"max_steps": 3, "max_grad_norm": 0.0, "learning_rate": 1e-4, **extra}
        as_on_a_gpu(make_trainer(copy.deepcopy(student), data, [callback, recorder], **all_args)).train()
        runs.append(recorder)
    check(runs[1], runs[0], 1e-5 if "activation_checkpointing" in args else 0.05)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_accumulation_gives_what_one_batch_does(make_trainer: Any, kind: str) -> None:
    """Law 6, for task losses that are divided by the number of items; windows of 3, 3 and 2 examples."""
    student, teacher = models(kind)
    flats = []
    for size in (8, 3):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-8 // size), "max_steps": 1}
        callbacks = [DistillationCallback(config("hidden_mse"), teacher)]
        flats.append(gradients(make_trainer, student, examples(kind), callbacks, **args))
    check(flats[1], flats[0], 1e-5)
