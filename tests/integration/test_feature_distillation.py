"""Gradients of feature distillation in a real Trainer, against those of a Trainer that computes the loss by hand."""

import copy
from typing import Any

import pytest
import torch
from features_by_hand import ALPHA, WEIGHT, Lesson, config, examples, models, trainer_by_hand
from torch import Tensor
from training_runs import Recorder, distance

from hf_compress import DistillationCallback, TrainingError

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
