"""Finding out whether a loss is divided by ``num_items_in_batch``, whatever it does with that number."""

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, Trainer

from hf_compress import DistillationCallback, DistillationConfig, TrainingError
from hf_compress.callbacks.item_count import CountProbe, gradient_says, loss_of_twice_as_many, values_say

CPU = torch.device("cpu")


def weight() -> Tensor:
    return torch.tensor([2.0, 3.0], requires_grad=True)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda n: weight().sum() / n, True),
        (lambda n: weight().sum() / n.to(torch.float64), True),
        (lambda n: weight().mean(), False),
        (lambda n: weight().sum().detach(), False),
        (lambda n: weight().sum() / n if n > 0 else weight().sum(), True),
    ],
)
def test_the_gradient_says(loss: Any, expected: bool) -> None:
    probe = CountProbe.of(4, CPU)
    assert gradient_says(loss(probe), probe) is expected


@pytest.mark.parametrize("read", [Tensor.item, int, Tensor.tolist, lambda n: n.long().item(), lambda n: int(2 * n)])
def test_a_number_that_was_read_is_noticed(read: Any) -> None:
    probe = CountProbe.of(torch.tensor(4), CPU)
    with pytest.raises(TrainingError, match="reads num_items_in_batch as a number"):
        gradient_says(weight().sum() / read(probe), probe)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda outputs, labels, num_items_in_batch: outputs.sum() / int(num_items_in_batch), True),
        (lambda outputs, labels, num_items_in_batch: outputs.sum() / num_items_in_batch, True),
        (lambda outputs, labels, num_items_in_batch: outputs.mean(), False),
        (lambda outputs, labels, num_items_in_batch: outputs.mean() * torch.rand(()), False),
        (lambda outputs, labels, num_items_in_batch: 0 * outputs.sum(), None),
        (lambda outputs, labels, num_items_in_batch: outputs.sum() / 0, None),
    ],
)
@pytest.mark.parametrize("num_items", [4, torch.tensor(4)])
def test_the_values_say(loss: Any, expected: bool | None, num_items: Any) -> None:
    outputs, kwargs = weight(), {"num_items_in_batch": num_items}
    twice = loss_of_twice_as_many(loss, outputs, None, kwargs, CPU)
    assert values_say(loss(outputs, None, num_items), twice) is expected


@pytest.mark.parametrize(
    ("first", "twice", "expected"),
    [
        (1.0, 1.0005, False), (1.0, 1.002, True), (-1.0, -1.0005, False), (-1.0, -1.002, True), (1e-6, 2e-6, True),
        (0.0, 1.0, None), (1.0, 0.0, True), (1.0, float("inf"), True), (float("inf"), 1.0, None),
        (float("nan"), 1.0, None), (float("-inf"), 1.0, None),
    ],
)  # fmt: skip
def test_the_values_say_within_rounding(first, twice, expected) -> None:
    assert values_say(torch.tensor([first]), torch.tensor(twice, dtype=torch.float64)) is expected


def test_what_a_loss_draws_is_drawn_again_and_its_inputs_may_be_differentiated() -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Tensor:
        outputs["a"].sum().backward()
        assert outputs["a"].grad is not None and not outputs["b"].requires_grad
        random.random(), numpy.random.rand(), torch.rand(1)
        return outputs["a"].sum() * num_items_in_batch

    outputs = {"a": weight(), "b": torch.ones(2), "text": "text"}
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state()
    found = loss_of_twice_as_many(loss, outputs, None, {"num_items_in_batch": 3}, CPU)
    assert found == 30.0 and not found.requires_grad and outputs["a"].grad is None
    assert random.getstate() == states[0] and numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_a_probe_is_a_number_of_its_own() -> None:
    given = torch.tensor(4)
    probe = CountProbe.of(given, CPU)
    assert probe.dtype == torch.float32 and probe.requires_grad and probe.shape == ()
    other = CountProbe.of(probe.detach(), CPU)
    assert probe.reads == other.reads == [] and not given.is_floating_point()
    float(probe), bool(other)
    assert probe.reads == ["__float__"] and other.reads == ["__bool__"]


def test_a_loss_may_change_what_it_is_given() -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        outputs["logits"] *= 2
        labels += 1
        return (outputs.pop("logits") * labels).sum() / num_items_in_batch

    outputs, labels = {"logits": torch.ones(2)}, torch.ones(2)
    assert loss_of_twice_as_many(loss, outputs, labels, {"num_items_in_batch": 4}, CPU) == 1.0
    assert outputs["logits"].tolist() == labels.tolist() == [1.0, 1.0]


class ReadsNumber(BertForSequenceClassification):
    """A model with code of its own, which divides by a Python number."""

    def forward(self, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(**kwargs)
        total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        outputs["loss"] = total / num_items_in_batch.item()
        return outputs


def test_a_model_that_reads_the_number_is_an_error(make_trainer: Any, tiny_bert: Any, classification_data: Any) -> None:
    student = ReadsNumber(tiny_bert().config)
    callback = DistillationCallback(DistillationConfig(), tiny_bert(seed=1))
    trainer = make_trainer(student, classification_data(), [callback], remove_unused_columns=False)
    with pytest.raises(TrainingError, match="forward reads num_items_in_batch"):
        trainer.train()


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class CountsWaits(Trainer):
    counts: tuple[int, ...] = ()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            loss = super().training_step(*args, **kwargs)
        self.counts += (waits.count,)
        return loss


def test_classification_never_waits_for_the_device(make_trainer: Any, tiny_bert: Any, classification_data: Any) -> None:
    """After the first steps; the loss scale of mixed precision is multiplied on the device."""

    def waits(*callbacks: Any) -> int:
        trainer = make_trainer(tiny_bert(), classification_data(), list(callbacks), trainer_class=CountsWaits)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        trainer.train()
        return int(trainer.counts[2])

    of_a_model = waits()  # the teacher's forward waits as often as the student's
    assert waits(DistillationCallback(DistillationConfig(), tiny_bert(seed=1))) == 2 * of_a_model
