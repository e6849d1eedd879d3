"""Run by ``test_distillation_ddp.py`` in two processes; every assertion is made on both ranks."""

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_trainers import Gradients, trained, trainer_of
from taught_tasks import ALPHA, TASKS, TEMPERATURE, differences
from tiny_models import bert, llama
from transformers import Trainer

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.ranks import all_reduce_mean
from hf_compress.config import DistillationConfig, PruningConfig
from hf_compress.errors import TrainingError

CONFIG = DistillationConfig(alpha=0.7, temperature=2.0)


class IgnoresLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return F.cross_entropy(model(**inputs).logits, inputs["labels"])


def gradient_in_training(*args: Any, callbacks: Any = (), **kwargs: Any) -> tuple[torch.Tensor, Trainer]:
    gradients = Gradients()
    trainer = trained(args[0], args[1], [*callbacks, gradients], args[2], **kwargs)
    return gradients.flat, trainer


def gradient_by_hand(model: Any, loss: Any) -> torch.Tensor:
    model = copy.deepcopy(model).train()
    loss(model).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def check_gradients(make: Any, data: Any, shift: bool, folder: str) -> None:
    """The mixed loss has the scale that DDP and accumulation give to the plain one, and ranks agree."""
    student, teacher = make(), make().eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}

    def losses(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = batch["input_ids"], batch["labels"]
        own = model(input_ids=ids).logits
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits
        if shift:
            own, theirs, labels = own[:, :-1], theirs[:, :-1], labels[:, 1:]
        own, theirs, labels = own[labels != -100], theirs[labels != -100], labels[labels != -100]
        p, q = F.softmax(theirs / 2, -1), F.softmax(own / 2, -1)
        return F.cross_entropy(own, labels), 4 * (p * (p / q).log()).sum(-1).mean()

    plain, _ = gradient_in_training(student, data, folder)
    task = gradient_by_hand(student, lambda model: losses(model)[0])
    scale = plain.norm() / task.norm()
    torch.testing.assert_close(plain, scale * task, rtol=1e-3, atol=1e-4)

    mixed, trainer = gradient_in_training(
        student,
        data,
        folder,
        callbacks=[DistillationCallback(CONFIG, teacher)],
        save_strategy="steps",
        save_steps=1,
    )
    expected = gradient_by_hand(student, lambda model: 0.3 * losses(model)[0] + 0.7 * losses(model)[1])
    torch.testing.assert_close(mixed, scale * expected, rtol=1e-3, atol=1e-4)
    log = trainer.state.log_history[0]
    assert abs(log["loss"] - 0.3 * log["task_loss"] - 0.7 * log["distillation_loss"]) < 1e-3 * log["loss"], log


def check_against_a_loss_by_hand(folder: str) -> None:
    """Batches of the ranks count different numbers of tokens, and the last window has one batch less."""

    def make(model: Any, data: Any, callbacks: Any, trainer_class: type[Trainer], **args: Any) -> Trainer:
        sizes = {"max_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
        return trainer_of(model, data, callbacks, folder, trainer_class, **sizes, **args)

    config = DistillationConfig(alpha=ALPHA, temperature=TEMPERATURE)
    for name in ("classes", "next tokens", "t5", "bart", "answers"):
        for options in ({}, {"label_smoothing_factor": 0.2, "per_item": True}):
            if options and name == "answers":  # the Trainer smooths nothing but "labels"
                continue
            found = differences(make, TASKS[name], lambda teacher: DistillationCallback(config, teacher), **options)
            assert max(found) <= 1e-6, (name, options, found)


def check_the_student_as_teacher(data: Any, folder: str) -> None:
    """A copy is what copy.deepcopy gives, and masks agree where the student teaches itself without them."""
    student = bert()
    pruning = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 0, "end": 1, "update_every": 1}
    gradients = []
    for teacher in ("self", copy.deepcopy(student), "unmasked", ["self", "unmasked"]):
        callbacks = [PruningCallback(PruningConfig(**pruning)), DistillationCallback(CONFIG, teacher)]
        gradient, _ = gradient_in_training(student, data, folder, callbacks=callbacks, max_steps=2)
        mean = all_reduce_mean(gradient)
        torch.testing.assert_close(mean, gradient, rtol=1e-6, atol=1e-8)
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[1])


def check_guard(data: Any, folder: str) -> None:
    """DDP calls the gradient hook with None instead of not at all."""
    trainer = trainer_of(bert(), data, [DistillationCallback(CONFIG, bert())], folder, IgnoresLoss)
    try:
        trainer.train()
    except TrainingError as error:
        assert "does not contain it" in str(error)
    else:
        raise AssertionError("nothing was raised")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (8, 6), generator=generator)
    sentences = [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    # Ragged labels, so that ranks and micro-batches count different numbers of tokens.
    texts = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for index, text in enumerate(texts):
        text["labels"][index % 5 + 1 :] = -100
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    check_gradients(lambda: bert(**no_dropout), sentences, False, f"{folder}/bert")
    check_gradients(llama, texts, True, f"{folder}/llama")
    rank = float(dist.get_rank())
    assert all_reduce_mean(torch.tensor([rank, 2 * rank])).tolist() == [0.5, 1.0]
    check_guard(sentences, f"{folder}/guard")
    check_against_a_loss_by_hand(f"{folder}/tasks")
    check_the_student_as_teacher(sentences, f"{folder}/self")


if __name__ == "__main__":
    main(sys.argv[1])
