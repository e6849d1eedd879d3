"""What a teacher says about a batch, as a distillation loss reads it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseLogits:
    """The largest logits of each position, and what all others add up to.

    The probabilities of the k classes and of "any other class" at temperature T are ``softmax(cat([values / T,
    log_rest]))``: the teacher's distribution with all other classes taken together.
    """

    values: Tensor
    """The largest logits, descending, not divided by the temperature, float32, [..., k]."""

    indices: Tensor
    """Their classes, int64, [..., k]."""

    log_rest: Tensor
    """``logsumexp(logit / temperature)`` over all other classes, float32, [...]."""

    temperature: float
    """The temperature of ``log_rest``."""

    num_classes: int
    """Of the teacher."""


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs for one batch, in the layout of the batch."""

    outputs: dict[str, Tensor | SparseLogits]
    """By name, such as ``logits``: [batch, ...] or [batch, length, ...]; 0 at positions that are not known."""

    counts: Tensor | None
    """Positions of token-level outputs that are known, bool, [batch, length]; others must not teach. None if there
    is one output for each example."""
