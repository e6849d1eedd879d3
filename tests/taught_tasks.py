"""Tasks that a teacher can teach, and a Trainer that distills them as one writes it by hand.

Nothing here uses hf_compress: what its callback makes of a Trainer is compared with this.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from zoo import ALL
from zoo.base import ENCODER, Tiny, randomize

ALPHA, TEMPERATURE = 0.7, 3.0
NUM_EXAMPLES = 10
"""With batches of 2 and accumulation over 3, an epoch is two windows, of 3 and 2 batches."""

LENGTH = 8
Example = dict[str, Tensor]


def random_numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def texts(number: int = NUM_EXAMPLES, vocabulary: int = 97) -> tuple[Tensor, Tensor]:
    """Return padded ids and their mask; no two examples in a row are of equal length."""
    ids = torch.randint(5, vocabulary, (number, LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = 3 + 5 * torch.arange(number) % (LENGTH - 2)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return ids * mask, mask


def examples(**columns: Tensor) -> list[Example]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def text_examples(labels: Callable[[Tensor, Tensor], Tensor]) -> list[Example]:
    ids, mask = texts()
    return examples(input_ids=ids, attention_mask=mask, labels=labels(ids, mask))


def ragged(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.masked_fill(mask == 0, -100)


def some(ids: Tensor, mask: Tensor) -> Tensor:
    """The first token of each text, and a third of the others."""
    hidden = (ids % 3 > 0) & (torch.arange(LENGTH) > 0)
    return ragged(ids, mask).masked_fill(hidden, -100)


def choices() -> list[Example]:
    ids, mask = texts(2 * NUM_EXAMPLES)
    shape = (NUM_EXAMPLES, 2, LENGTH)
    return examples(input_ids=ids.view(shape), attention_mask=mask.view(shape), labels=torch.arange(NUM_EXAMPLES) % 2)


def answers() -> list[Example]:
    ids, mask = texts()
    start, end = ids[:, 0] % 3, mask.sum(1) - 1
    return examples(input_ids=ids, attention_mask=mask, start_positions=start, end_positions=end)


def translations() -> list[Example]:
    """With what the decoder reads, as data collators give it: smoothed labels do not reach the model."""
    ids, mask = texts()
    words = ids.flip(0) * mask.flip(0)
    shifted = torch.cat([torch.zeros_like(ids[:, :1]), words[:, :-1]], dim=1)
    labels = words.masked_fill(words == 0, -100)
    return examples(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, labels=labels)


def images() -> list[Example]:
    pixels = random_numbers(NUM_EXAMPLES, 3, 16, 16)
    return examples(pixel_values=pixels, labels=torch.arange(NUM_EXAMPLES) % 3)


def speech(padded: bool) -> list[Example]:
    waves = random_numbers(NUM_EXAMPLES, 400)
    mask = (torch.arange(400) < (400 - 40 * (torch.arange(NUM_EXAMPLES) % 4))[:, None]).long()
    labels = torch.randint(1, 29, (NUM_EXAMPLES, 4), generator=torch.Generator().manual_seed(2))
    labels[::2, 3:] = -100
    columns = {"input_values": waves * mask, "attention_mask": mask, "labels": labels}
    return examples(**{name: column for name, column in columns.items() if padded or name != "attention_mask"})


# Losses of logits, of every position that there is: [...] of [..., classes].


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """T^2 * KL(teacher || student) of distributions over the classes."""
    log_q, p = F.log_softmax(student / TEMPERATURE, dim=-1), F.softmax(teacher / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * F.kl_div(log_q, p, reduction="none").sum(-1)


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def yes_or_no(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence, of the distribution over yes and no of each class."""
    pairs = [torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher)]
    return divergence(*pairs).mean(-1)


# What is taught of a batch: the student's and the teacher's logits at the positions that count.

Pairs = tuple[Tensor, Tensor]


def of_labels(own: Any, theirs: Any, batch: Mapping[str, Tensor], model: Any) -> Pairs:
    counted = batch["labels"] != -100
    return own.logits[counted], theirs.logits[counted]


def of_next_tokens(own: Any, theirs: Any, batch: Mapping[str, Tensor], model: Any) -> Pairs:
    counted = batch["labels"][:, 1:] != -100
    return own.logits[:, :-1][counted], theirs.logits[:, :-1][counted]


def of_examples(own: Any, theirs: Any, batch: Mapping[str, Tensor], model: Any) -> Pairs:
    return own.logits, theirs.logits


def of_spans(own: Any, theirs: Any, batch: Mapping[str, Tensor], model: Any) -> Pairs:
    """Padding is no candidate: a distribution is one over the tokens of its text."""
    excluded = batch["attention_mask"] == 0
    return tuple(
        torch.cat([each.start_logits, each.end_logits]).masked_fill(excluded.repeat(2, 1), -1e4)
        for each in (own, theirs)
    )  # type: ignore[return-value]


def of_frames(own: Any, theirs: Any, batch: Mapping[str, Tensor], model: Any) -> Pairs:
    frames = own.logits.shape[1]
    lengths = torch.full((len(own.logits),), frames)
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1)
        for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
    counted = torch.arange(frames) < lengths[:, None]
    return own.logits[counted], theirs.logits[counted]


@dataclass(frozen=True)
class Task:
    """A model of the zoo with a head, data for it, and how one would distill it."""

    build: Tiny
    data: Callable[[], list[Example]]
    pairs: Callable[..., Pairs]
    loss: Callable[[Tensor, Tensor], Tensor] = divergence
    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the model's config."""

    per_item: bool = False
    """Whether the task loss is a sum divided by the number of labels in all batches of a step."""

    def student(self) -> PreTrainedModel:
        return self.build(**self.changes).train()

    def teacher(self) -> PreTrainedModel:
        return randomize(self.student(), seed=1)


MULTI_LABEL = {"num_labels": 3, "problem_type": "multi_label_classification"}
THREE = {"num_labels": 3, "problem_type": None}


def classes(ids: Tensor, mask: Tensor) -> Tensor:
    return ids[:, 0] % 3


def yes_no_labels(ids: Tensor, mask: Tensor) -> Tensor:
    return (ids[:, :3] % 2).float()


def values(ids: Tensor, mask: Tensor) -> Tensor:
    return random_numbers(len(ids), 3)


TASKS: dict[str, Task] = {
    "classes": Task(ALL["bert"], lambda: text_examples(classes), of_examples, changes=THREE),
    "classes by a decoder": Task(
        ALL["llama_classify"], lambda: text_examples(classes), of_examples, changes={**THREE, "pad_token_id": 0}
    ),
    "value": Task(
        ALL["bert"], lambda: text_examples(lambda ids, mask: values(ids, mask)[:, 0]), of_examples, squares,
        {"num_labels": 1},
    ),
    "several values": Task(
        ALL["bert"], lambda: text_examples(values), of_examples, squares, {**THREE, "problem_type": "regression"}
    ),
    "several labels": Task(ALL["bert"], lambda: text_examples(yes_no_labels), of_examples, yes_or_no, MULTI_LABEL),
    "several labels by their type": Task(
        ALL["roberta"], lambda: text_examples(yes_no_labels), of_examples, yes_or_no, THREE
    ),
    "token classes": Task(
        ALL["bert_tokens"], lambda: text_examples(lambda ids, mask: ragged(ids % 3, mask)), of_labels, changes=THREE
    ),
    "choices": Task(Tiny("bert_choices", "BertForMultipleChoice", ENCODER), choices, of_examples),
    "answers": Task(ALL["bert_qa"], answers, of_spans),
    "masked tokens": Task(ALL["bert_mlm"], lambda: text_examples(some), of_labels),
    "next tokens": Task(ALL["llama"], lambda: text_examples(ragged), of_next_tokens, per_item=True),
    "next tokens of gpt2": Task(ALL["gpt2"], lambda: text_examples(ragged), of_next_tokens, per_item=True),
    "t5": Task(ALL["t5"], translations, of_labels),
    "bart": Task(ALL["bart"], translations, of_labels),
    "images": Task(ALL["vit"], images, of_examples, changes=THREE, per_item=True),
    "speech": Task(ALL["wav2vec2"], lambda: speech(padded=False), of_frames),
    "padded speech": Task(ALL["wav2vec2_layer_norm"], lambda: speech(padded=True), of_frames),
}  # fmt: skip


class ByHand(Trainer):
    """What one would write without the callback: ``loss = (1 - alpha) * task + alpha * distillation``."""

    task: Task
    teacher: PreTrainedModel
    per_item: bool | None = None
    """None: as the model does."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        task_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            return (task_loss, outputs) if return_outputs else task_loss
        given = {name: value for name, value in batch.items() if name not in ("start_positions", "end_positions")}
        if not self.teacher.config.is_encoder_decoder or "decoder_input_ids" in given:
            given.pop("labels", None)
        with torch.no_grad(), self.accelerator.autocast():
            theirs = self.teacher.eval()(**given)
        own, wanted = self.task.pairs(outputs, theirs, batch, self.teacher)
        losses = self.task.loss(own, wanted.to(own.dtype))  # autocast leaves the teacher's in half precision
        return (1 - ALPHA) * task_loss + ALPHA * losses.sum() * self._scale(losses, num_items_in_batch)

    def _scale(self, losses: Tensor, num_items: Any) -> Any:
        """Return that of the task loss: 1 / number, times what the Trainer multiplies by, whatever its loss reads."""
        per_item = self.task.per_item if self.per_item is None else self.per_item
        ranks = 1
        if num_items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            ranks = self.accelerator.num_processes
        return ranks / (num_items if per_item and num_items is not None else losses.numel())


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step, [parameters] each."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        self.steps.append(torch.cat(found).double())


def in_dtype(data: list[Example], dtype: torch.dtype) -> list[Example]:
    return [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in example.items()}
        for example in data
    ]


def differences(
    make: Callable[..., Trainer], task: Task, callback: Callable[[Any], Any], **options: Any
) -> list[float]:
    """Return how far the gradients of a Trainer with the callback are from those by hand, relative, per step.

    Args:
        make: ``make(model, data, callbacks, trainer_class=..., **options)``.
        task: What is taught.
        callback: Makes the callback of a teacher.
        options: For ``make``; ``per_item`` says what a loss that is not the model's own is divided by, ``dtype`` what
            is computed in.
    """
    per_item, dtype = options.pop("per_item", None), options.pop("dtype", torch.float64)
    student, teacher, data = task.student().to(dtype), task.teacher().to(dtype), in_dtype(task.data(), dtype)
    by_hand, ours = Gradients(), Gradients()
    reference: Any = make(copy.deepcopy(student), data, [by_hand], trainer_class=ByHand, **options)
    reference.task, reference.teacher, reference.per_item = task, copy.deepcopy(teacher), per_item
    reference.train()
    make(copy.deepcopy(student), data, [callback(teacher), ours], trainer_class=Trainer, **options).train()
    assert len(ours.steps) == len(by_hand.steps)
    assert all(float(step.norm()) > 0 for step in by_hand.steps)
    pairs = zip(ours.steps, by_hand.steps, strict=True)
    return [float((own - theirs).norm() / theirs.norm()) for own, theirs in pairs]
