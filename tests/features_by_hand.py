"""Feature distillation written out: loops over examples, layers and positions in a Trainer of its own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from training_runs import NO_DROPOUT
from transformers import Trainer
from zoo import ZOO, randomize

from hf_compress import DistillationConfig
from hf_compress.config import FeatureConfig

ALPHA, WEIGHT, RELATION_HEADS = 0.6, 1.7, 2

DROPOUT: dict[str, dict[str, Any]] = {
    "bert": NO_DROPOUT,
    "vit": NO_DROPOUT,
    "llama": {},
    "t5": {"dropout_rate": 0.0},
    "bart": {"dropout": 0.0},
}
STACKS = {"t5": ("encoder", "decoder"), "bart": ("encoder", "decoder")}
PAD = {"pad_token_id": 0, "decoder_start_token_id": 2}

Pairs = Sequence[tuple[int, int]]


def config(loss: str, **changes: Any) -> DistillationConfig:
    """Features alone, with weights that can be seen in the result."""
    return DistillationConfig(alpha=ALPHA, loss=None, features=(FeatureConfig(loss=loss, weight=WEIGHT, **changes),))


def models(kind: str, *, teacher: dict[str, Any] | None = None, **sizes: Any) -> tuple[Any, Any]:
    """A student without dropout and a teacher with other weights."""
    special = PAD if kind == "bart" else {}
    labels = {"num_labels": 3} if kind in ("bert", "vit") else {}
    own = {"attn_implementation": "eager", **DROPOUT[kind], **special, **labels, **sizes}
    return ZOO[kind](**own).train(), randomize(ZOO[kind](**{**own, **(teacher or {})}), seed=1)


def examples(kind: str, number: int = 8) -> list[dict[str, Tensor]]:
    """Ragged texts with one label, or with one for each token; images."""
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        pixels = torch.randn(number, 3, 16, 16, generator=generator)
        return [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(pixels)]
    ids = torch.randint(5, 97, (number, 7), generator=generator)
    mask = torch.arange(7) < torch.randint(3, 8, (number, 1), generator=generator)
    found = [{"input_ids": row * keep, "attention_mask": keep.long()} for row, keep in zip(ids, mask, strict=True)]
    targets = torch.randint(5, 97, (number, 5), generator=generator)
    for i, example in enumerate(found):
        if kind == "bert":
            example["labels"] = torch.tensor(i % 3)
        elif kind == "llama":
            # Prompts count for nothing in the task, and yet have features.
            example["labels"] = example["input_ids"].masked_fill(~mask[i], -100)
            example["labels"][: i % 3] = -100
        else:
            example["labels"] = targets[i].masked_fill(torch.arange(5) >= 2 + i % 4, -100)
    return found


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher) ** 2).sum() / student.numel()


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    there = teacher > 0  # causal maps have zeros
    p, q = teacher[there], student[there]
    num_rows = teacher.shape[0] * teacher.shape[1]
    return (p * (p / q).log()).sum() / num_rows


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    values = []
    for part_s, part_t in zip(student.chunk(RELATION_HEADS, 1), teacher.chunk(RELATION_HEADS, 1), strict=True):
        q, p = ((each @ each.T / math.sqrt(each.shape[1])).softmax(-1) for each in (part_s, part_t))
        values.append((p * (p.log() - q.log())).sum(1).mean())
    return sum(values) / len(values)  # type: ignore[return-value]


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hidden_mse": hidden_mse,
    "attention_kl": attention_kl,
    "relations": relations,
}


def seen(model: Any, kind: str, loss: str, inputs: dict[str, Any]) -> tuple[Any, dict[str, list[list[Tensor]]]]:
    """Outputs of a model, and by stack what each layer shows of one kind or of three: [kinds][layers]."""
    handles, vectors = [], {part: [] for part in ("query", "key", "value")}
    if loss == "relations":
        for layer in model.bert.encoder.layer:
            for part in vectors:
                projection = getattr(layer.attention.self, part)
                handles.append(projection.register_forward_hook(lambda _m, _i, out, to=vectors[part]: to.append(out)))
    outputs = model(**inputs, output_hidden_states=True, output_attentions=loss == "attention_kl")
    for handle in handles:
        handle.remove()
    if loss == "relations":
        return outputs, {"": list(vectors.values())}
    stacks = STACKS.get(kind, ("",))
    name = "attentions" if loss == "attention_kl" else "hidden_states"
    first = int(name == "hidden_states")
    return outputs, {each: [list(outputs[f"{each}_{name}".strip("_")][first:])] for each in stacks}


def counted(kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """How many positions of each example the task loss counts."""
    labels = inputs["labels"]
    if labels.dim() == 1:
        return torch.ones(len(labels))
    return (labels[:, 1:] if kind == "llama" else labels).ne(-100).sum(1).float()


def positions(stack: str, inputs: dict[str, Tensor], length: int) -> Tensor:
    """Which positions hold something, [batch, length]."""
    if stack == "decoder":
        return inputs["labels"] != -100
    mask = inputs.get("attention_mask")
    return torch.ones(len(inputs["labels"]), length).bool() if mask is None else mask.bool()


def cut(feature: Tensor, example: int, keep: Tensor) -> Tensor:
    one = feature[example].float()
    return one[:, keep][:, :, keep] if one.dim() == 3 else one[keep]


@dataclass
class Lesson:
    """What to compare, and with whom."""

    kind: str
    loss: str
    teacher: Any
    pairs: Pairs
    maps: dict[str, Tensor] | None = None
    """By stack and student layer, what the student's features are multiplied by."""

    def per_example(self, inputs: dict[str, Tensor], own: dict[str, Any], theirs: dict[str, Any]) -> list[Tensor]:
        found = []
        for example in range(len(inputs["labels"])):
            values = [
                self.compare(stack, i, cut(mine[i], example, keep), cut(others[j], example, keep))
                for stack in own
                for mine, others in zip(own[stack], theirs[stack], strict=True)
                for i, j in self.pairs
                for keep in [positions(stack, inputs, mine[i].shape[-2])[example]]
            ]
            found.append(sum(values) / len(values))
        return found

    def compare(self, stack: str, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        if self.maps is not None:
            student = student @ self.maps[f"{stack}{layer}"]
        return FORMULAS[self.loss](student, teacher)

    def loss_of(self, model: Any, inputs: dict[str, Tensor], **extra: Any) -> tuple[Any, Tensor, Tensor]:
        """Return outputs, what each example's features come to, and how much each counts."""
        with torch.no_grad():
            _, theirs = seen(self.teacher, self.kind, self.loss, dict(inputs))
        outputs, own = seen(model, self.kind, self.loss, {**inputs, **extra})
        return outputs, torch.stack(self.per_example(inputs, own, theirs)), counted(self.kind, inputs)


def trainer_by_hand(lesson: Lesson, *, per_item: bool = False, task: Any = None) -> type[Trainer]:
    """A Trainer that computes (1 - alpha) * task + alpha * weight * features itself.

    Args:
        lesson: What to compare.
        per_item: Whether the task loss is a sum divided by ``num_items_in_batch``.
        task: Computes the task loss from outputs, labels and the number of items; None: the model does.
    """

    class ByHand(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            extra = {"num_items_in_batch": num_items_in_batch} if self.model_accepts_loss_kwargs else {}
            outputs, values, counts = lesson.loss_of(model, inputs, **extra)
            total = num_items_in_batch if per_item else counts.sum()
            features = (values * counts).sum() / total
            task_loss = outputs.loss if task is None else task(outputs, inputs["labels"], num_items_in_batch)
            return (1 - ALPHA) * task_loss + ALPHA * WEIGHT * features

    return ByHand
