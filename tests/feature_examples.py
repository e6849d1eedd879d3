"""Inputs for each feature loss, and the same losses written as loops over one text without padding."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_compress.distillation.losses import FeatureLoss, Features
from hf_compress.registry import distillation_losses

NAMES = [name for name in distillation_losses if distillation_losses.get(name).reads != "logits"]
RELATION_HEADS = 2
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
"""Right, left and inner padding, and a single position."""

Array = np.ndarray[Any, Any]


def get(name: str) -> FeatureLoss:
    loss = distillation_losses.get(name)
    assert isinstance(loss, FeatureLoss)
    return loss


def options(loss: FeatureLoss) -> dict[str, Any]:
    return {"relation_heads": RELATION_HEADS} if "relation_heads" in loss.options else {}


def draw(loss: FeatureLoss, width: int, batch: int, length: int, generator: torch.Generator) -> Features:
    def one() -> Tensor:
        shape = (batch, width // 2, length, length) if loss.reads == "attentions" else (batch, length, width)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.softmax(-1) if loss.reads == "attentions" else values

    return (one(), one()) if loss.successive else one()


def features(loss: FeatureLoss, *, seed: int = 0, batch: int = 4, length: int = 5) -> tuple[Features, Features]:
    """Student and teacher, float64; of unequal widths or numbers of heads where the loss allows it."""
    generator = torch.Generator().manual_seed(seed)
    student = draw(loss, 4, batch, length, generator)
    return student, draw(loss, 4 if loss.needs_equal_width else 6, batch, length, generator)


def each(function: Callable[[Tensor], Tensor], value: Features) -> Features:
    return (function(value[0]), function(value[1])) if isinstance(value, tuple) else function(value)


def tensors(value: Features) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def where_counted(value: Tensor, mask: Tensor) -> Tensor:
    """Bool of the shape of ``value``: what belongs to positions that count."""
    if value.dim() == 4:
        return (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(value)
    return mask[:, :, None].expand_as(value)


def cut(value: Features, mask: Tensor, example: int) -> Any:
    """The values of one example at the positions that count, as numpy arrays."""

    def one(tensor: Tensor) -> Array:
        rows = tensor[example].numpy()
        keep = mask[example].numpy()
        return rows[:, keep][:, :, keep] if tensor.dim() == 4 else rows[keep]

    return tuple(one(tensor) for tensor in value) if isinstance(value, tuple) else one(value)


def reference(name: str, student: Features, teacher: Features, mask: Tensor) -> Tensor:
    function = REFERENCES[name]
    values = [function(cut(student, mask, i), cut(teacher, mask, i)) for i in range(len(mask))]
    return torch.tensor(values, dtype=torch.float64)


def hidden_mse(student: Array, teacher: Array) -> float:
    return float(((student - teacher) ** 2).sum() / student.size)


def hidden_cosine(student: Array, teacher: Array) -> float:
    cosines = [float(a @ b) / math.sqrt(a @ a) / math.sqrt(b @ b) for a, b in zip(student, teacher, strict=True)]
    return 1 - sum(cosines) / len(cosines)


def pkd(student: Array, teacher: Array) -> float:
    total = 0.0
    for a, b in zip(student, teacher, strict=True):
        total += np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2
    return total / len(student)


def gram(student: Array, teacher: Array) -> float:
    matrices = []
    for tokens in (student, teacher):
        rows = [[float(a @ b) for b in tokens] for a in tokens]
        matrices.append(np.array([np.array(row) / np.linalg.norm(row) for row in rows]))
    return float(np.linalg.norm(matrices[0] - matrices[1]) ** 2 / len(student) ** 2)


def fsp(student: tuple[Array, Array], teacher: tuple[Array, Array]) -> float:
    flows = [sum(np.outer(a, b) for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in (student, teacher)]
    return float(((flows[0] - flows[1]) ** 2).mean())


def discrepancy(kernel: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    """Squared MMD by its kernel expansion: mean k(t, t') + mean k(s, s') - 2 mean k(s, t) over channels."""

    def mean(first: Array, second: Array) -> float:
        pairs = [kernel(a / np.linalg.norm(a), b / np.linalg.norm(b)) for a in first.T for b in second.T]
        return sum(pairs) / len(pairs)

    return lambda student, teacher: mean(teacher, teacher) + mean(student, student) - 2 * mean(student, teacher)


def divergence(p: Array, q: Array) -> float:
    return math.fsum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def paired_heads(student: Array, teacher: Array) -> list[tuple[Array, Array]]:
    if len(student) != len(teacher):
        student, teacher = student.mean(0)[None], teacher.mean(0)[None]
    return list(zip(student, teacher, strict=True))


def attention_kl(student: Array, teacher: Array) -> float:
    values = [
        divergence(row_t / row_t.sum(), row_s / row_s.sum())
        for head_s, head_t in paired_heads(student, teacher)
        for row_s, row_t in zip(head_s, head_t, strict=True)
    ]
    return sum(values) / len(values)


def attention_mse(student: Array, teacher: Array) -> float:
    return float(np.mean([((a - b) ** 2).mean() for a, b in paired_heads(student, teacher)]))


def relations(student: Array, teacher: Array) -> float:
    values = []
    for head in range(RELATION_HEADS):
        rows = []
        for vectors in (student, teacher):
            size = vectors.shape[1] // RELATION_HEADS
            part = vectors[:, head * size : (head + 1) * size]
            weights = np.exp(part @ part.T / math.sqrt(size))
            rows.append(weights / weights.sum(1, keepdims=True))
        values += [divergence(p, q) for q, p in zip(*rows, strict=True)]
    return sum(values) / len(values)


REFERENCES: dict[str, Callable[[Any, Any], float]] = {
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
    "pkd": pkd,
    "gram": gram,
    "fsp": fsp,
    "nst": discrepancy(lambda a, b: float(a @ b) ** 2),
    "nst_linear": discrepancy(lambda a, b: float(a @ b)),
    "attention_kl": attention_kl,
    "attention_mse": attention_mse,
    "relations": relations,
}
