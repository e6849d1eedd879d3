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


class Embeds(Trainer):
    """Looks the tokens up itself, as adversarial training does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        return model(inputs_embeds=embeddings, **inputs).loss


class PositionalSmoother(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        return self.label_smoother(model(**inputs), labels, False)


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
        (Embeds, {}, "called with 'inputs_embeds'.*Call the model with input_ids"),
        (
            IgnoresSmoother,
            {"label_smoothing_factor": 0.1},
            r"no effect: the Trainer has label_smoother, .* did not call it.*self.label_smoother\(outputs, labels\)",
        ),
        (PositionalSmoother, {"label_smoothing_factor": 0.1}, "shift_labels by keyword"),
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


@pytest.mark.parametrize("alike", [True, False])
def test_frozen_embeddings_that_teacher_and_student_share_may_be_given(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, alike: bool
) -> None:
    finals, data = [], classification_data()
    for trainer_class in (Trainer, Embeds):
        student, teacher = tiny_bert(), tiny_bert(seed=0 if alike else 1)
        with torch.no_grad():
            teacher.classifier.weight.mul_(2)
        student.get_input_embeddings().requires_grad_(False)
        callbacks = [DistillationCallback(CONFIG, teacher)]
        trainer = make_trainer(student, data, callbacks, trainer_class=trainer_class)
        if not alike and trainer_class is Embeds:
            with pytest.raises(TrainingError, match="a teacher that has the same"):
                trainer.train()
            return
        trainer.train()
        finals.append(student.state_dict())
    assert all(torch.equal(finals[0][name], tensor) for name, tensor in finals[1].items())
