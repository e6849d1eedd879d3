"""What a loss between a student and its teacher is: tensors in, one number per position or per example out.

Masking of logits, weights and normalization belong to the caller, who knows what the task loss does.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hf_compress.errors import TrainingError
from hf_compress.registry import distillation_losses

FeatureReading = Literal["hidden_states", "attentions", "relations"]
"""What a feature loss is given: hidden states; attention probabilities; or queries, keys or values."""

LayerPair = tuple[Tensor, Tensor]
"""The same kind of tensor of two successive layers."""

Features = Tensor | LayerPair


class DistillationLoss(Protocol):
    """Compares logits, [positions, classes] each, and returns [positions]."""

    def __call__(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class LogitsLoss:
    """A ``DistillationLoss`` and what its caller must know about it."""

    function: DistillationLoss

    uses_temperature: bool = True
    """Whether the temperature has an effect; if not, a caller must refuse one."""

    reads: ClassVar[Literal["logits"]] = "logits"

    def __call__(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the loss of every position, [positions], in float32 or better."""
        return self.function(student, teacher, temperature)


@dataclass(frozen=True)
class FeatureLoss:
    """Compares what is inside of the models; the function gets tensors in float32 or better, with zeros at padding."""

    function: Callable[..., Tensor]

    reads: FeatureReading

    needs_equal_width: bool = False
    """Whether student and teacher must have the same width, so that a caller must project one of them."""

    successive: bool = False
    """Whether it takes two successive layers of each model, as a tuple of two tensors."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword arguments that the function takes in addition."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    def __call__(self, student: Features, teacher: Features, mask: Tensor, **options: Any) -> Tensor:
        """Return the loss of every example, averaged over the positions that count.

        Args:
            student: [batch, length, width], or [batch, heads, length, keys] where ``reads`` is ``"attentions"``; a
                tuple of two where ``successive``.
            teacher: The same of the teacher; heads, and the width unless ``needs_equal_width``, may differ.
            mask: Positions that count, bool, [batch, length].
            **options: Those in ``options``.

        Returns:
            One value per example, [batch], in float32 or better even under autocast; 0 where no position counts.
            What is at positions that do not count has no influence on the values or their gradients.

        Raises:
            TrainingError: If shapes do not fit each other.
        """
        layers = 2 if self.successive else 1
        own, theirs = _as_layers("student", student, layers), _as_layers("teacher", teacher, layers)
        for one, other in zip(own, theirs, strict=True):
            self._check(one, other, mask)
        dtype = torch.float32
        for tensor in (*own, *theirs):
            dtype = torch.promote_types(dtype, tensor.dtype)
        with torch.autocast(mask.device.type, enabled=False):
            ready = [tuple(_without_padding(tensor.to(dtype), mask) for tensor in side) for side in (own, theirs)]
            given = ready if self.successive else [side[0] for side in ready]
            name = getattr(self.function, "__name__", "custom")
            return _checked(self.function(*given, mask, **options), "example", len(mask), name)

    def _check(self, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
        given = f"student {list(student.shape)}, teacher {list(teacher.shape)}, mask {list(mask.shape)}"
        is_map = self.reads == "attentions"
        form = "[batch, heads, length, keys]" if is_map else "[batch, length, width]"
        if student.dim() != 3 + is_map or teacher.dim() != 3 + is_map or mask.dim() != 2:
            raise TrainingError(
                f"distillation: {self.reads} have shapes {given}; needed: {form}, mask [batch, length]."
            )
        if mask.dtype != torch.bool:
            raise TrainingError(
                f"distillation: the mask is {mask.dtype}; pass torch.bool, True where a position counts."
            )
        positions = [(len(tensor), tensor.shape[-2]) for tensor in (student, teacher)]
        other_keys = is_map and student.shape[-1] != teacher.shape[-1]
        if other_keys or any(shape != tuple(mask.shape) for shape in positions):
            raise TrainingError(
                f"distillation: {self.reads} of different texts: {given}. Student, teacher and mask need the same "
                "batch and length; use a teacher with the same inputs."
            )
        if self.needs_equal_width and student.shape[-1] != teacher.shape[-1]:
            raise TrainingError(
                f"distillation: {self.reads} of unequal widths: {given}. This loss needs equal ones; project the "
                "student's to the teacher's width, or use a loss that compares any widths."
            )


def loss_of_logits(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return what a registered loss says of each position, [positions].

    Args:
        name: Of the loss.
        student: Logits, [positions, classes].
        teacher: Logits, [positions, classes].
        temperature: T > 0.

    Raises:
        TrainingError: If the loss does not give one number for each position.
    """
    return _checked(distillation_losses.get(name)(student, teacher, temperature), "position", len(student), name)


def logits_loss(name: str, *, uses_temperature: bool = True) -> Callable[[DistillationLoss], LogitsLoss]:
    """Return a decorator that registers a loss of logits under ``name``."""

    def register(function: DistillationLoss) -> LogitsLoss:
        loss = LogitsLoss(function, uses_temperature)
        distillation_losses.register(name)(loss)
        return loss

    return register


def feature_loss(
    name: str, reads: FeatureReading, *, needs_equal_width: bool = False, successive: bool = False
) -> Callable[[Callable[..., Tensor]], FeatureLoss]:
    """Return a decorator that registers a loss of features under ``name``; see ``FeatureLoss``."""

    def register(function: Callable[..., Tensor]) -> FeatureLoss:
        loss = FeatureLoss(function, reads, needs_equal_width, successive)
        distillation_losses.register(name)(loss)
        return loss

    return register


def mean_over_positions(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values``, [batch, length], over the positions that count, [batch]; 0 if there are none."""
    return (values * mask).sum(1) / num_positions(mask)


def num_positions(mask: Tensor) -> Tensor:
    """Return how many positions count, [batch], at least 1 so that one can divide by it."""
    return mask.sum(1).clamp_min(1)


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Return vectors of length 1 along ``dim``; a zero vector stays zero and gets no gradient.

    ``F.normalize`` would give a zero vector a gradient of 1e12.
    """
    squared = vectors.square().sum(dim, keepdim=True)
    zero = squared < 1e-24
    return (vectors * squared.masked_fill(zero, 1.0).rsqrt()).masked_fill(zero, 0.0)


def _checked(losses: Any, each: str, number: int, name: str) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (number,):
        found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise TrainingError(
            f"distillation: the loss {name!r} returned {found} for {number} {each}s; needed: one number for each "
            f"{each}, [{number}]. Leave out means over {each}s, which the caller takes as the task loss does, and take "
            "those over classes or widths."
        )
    return losses


def _as_layers(whose: str, features: Features, number: int) -> tuple[Tensor, ...]:
    layers = features if isinstance(features, tuple) else (features,)
    if len(layers) != number:
        wanted = "a tuple of two successive layers" if number > 1 else "one tensor"
        raise TrainingError(f"distillation: the {whose} gave {len(layers)} tensors; this loss needs {wanted}.")
    return layers


def _without_padding(features: Tensor, mask: Tensor) -> Tensor:
    shape = (len(mask), *[1] * (features.dim() - 3), mask.shape[1], 1)
    return features.masked_fill(~mask.reshape(shape), 0.0)
