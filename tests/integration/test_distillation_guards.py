"""Trainers whose loss does not contain the distillation loss: errors before the first optimizer step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.config import DistillationConfig
from hf_compress.errors import TrainingError

ALPHA = 0.7
CONFIG = DistillationConfig(alpha=ALPHA, temperature=3.0)


@pytest.fixture
def pair(tiny_bert: Any, classification_data: Any) -> Callable[[], tuple[Any, Any, Any]]:
    """``pair()`` gives student, teacher and data."""
    return lambda: (tiny_bert(), tiny_bert(seed=1, hidden_size=16), classification_data())


class IgnoresLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, inputs["labels"])


class PopsLabels(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels)


class SkipsForward(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        hidden = model.bert(inputs["input_ids"]).pooler_output
        return F.cross_entropy(model.classifier(hidden), inputs["labels"])


class Positional(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(inputs["input_ids"], labels=inputs["labels"]).loss


class IgnoresSmoother(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**inputs).loss


@pytest.mark.parametrize(
    ("trainer_class", "args", "message"),
    [
        (IgnoresLoss, {}, "no effect: the loss that was differentiated does not contain it"),
        (PopsLabels, {}, "returned no loss to mix with"),
        (SkipsForward, {}, "no effect: the model's forward was not called"),
        (Positional, {}, "positional arguments"),
        (IgnoresSmoother, {"label_smoothing_factor": 0.1}, "no effect"),
    ],
)
def test_an_overridden_compute_loss_without_distillation_is_an_error(
    make_trainer: Any, pair: Any, trainer_class: type[Trainer], args: dict[str, Any], message: str
) -> None:
    """Law 10: raised before the first optimizer step."""
    student, teacher, data = pair()
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(student, data, [DistillationCallback(CONFIG, teacher)], trainer_class=trainer_class, **args)
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


class DoublesLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return 2 * model(**inputs).loss


def test_an_overridden_compute_loss_that_uses_the_loss_is_fine(make_trainer: Any, pair: Any) -> None:
    student, teacher, data = pair()
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_class=DoublesLoss,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx((1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"])


def test_outputs_that_cannot_be_taught_are_errors(make_trainer: Any, pair: Any) -> None:
    student, teacher, data = pair()
    student.config.return_dict = False
    with pytest.raises(TrainingError, match="got a tuple"):
        make_trainer(student, data, [DistillationCallback(CONFIG, teacher)]).train()
    student.config.return_dict = True
    unlabeled = [{name: value for name, value in example.items() if name != "labels"} for example in data]
    with pytest.raises(TrainingError, match="The data needs labels"):
        make_trainer(student, unlabeled, [DistillationCallback(CONFIG, teacher)]).train()


def test_a_teacher_that_says_nan_is_an_error(make_trainer: Any, pair: Any) -> None:
    student, teacher, data = pair()
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        make_trainer(student, data, [DistillationCallback(CONFIG, teacher)]).train()
