"""Several teachers at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_compress.callbacks.heads import Head
from hf_compress.callbacks.teacher import frozen
from hf_compress.callbacks.teachers import Lesson, LiveTeacher, Teacher, UnmaskedStudent
from hf_compress.distillation.positions import check_same_shape
from hf_compress.distillation.tokens import common_tokens
from hf_compress.errors import TrainingError
from hf_compress.teachers.outputs import SparseLogits


class Ensemble:
    """Several teachers, whose logits are averaged: the geometric mean of their distributions (Hinton et al. 2015).

    Args:
        members: The teachers.
        ordered: Whether it matters who is first, as where each has projections of its own.
        padded: Whether their vocabularies may be of different sizes: logits of the tokens that all have are averaged.
    """

    def __init__(self, members: Sequence[Teacher], ordered: bool = False, padded: bool = False) -> None:
        self.members = members
        self.ordered = ordered
        self.padded = padded

    def teach(self, inputs: Mapping[str, Any], head: Head, labels: Any = None) -> Lesson:
        """Ask all of them."""
        lessons = [member.teach(inputs, head, labels) for member in self.members]
        total: Tensor | None = None
        for lesson in lessons:
            if isinstance(lesson.logits, SparseLogits):
                raise TrainingError(
                    "distillation: a cache that holds only the largest logits (top_k) cannot be averaged with other "
                    "teachers. Make it without top_k, or use it alone."
                )
            if lesson.logits is None:
                continue
            logits = lesson.logits.float()
            if total is not None:
                if self.padded and head.has_tokens:
                    total, logits = common_tokens(total, logits)
                check_same_shape(total, logits)
            total = logits if total is None else total + logits.to(total.device)
        features = tuple(each for lesson in lessons for each in lesson.features)
        known = [lesson.known for lesson in lessons if lesson.known is not None]
        return Lesson(
            None if total is None else total / len(lessons), torch.stack(known).all(0) if known else None, features
        )

    def end_step(self) -> None:
        """Let all of them check."""
        for member in self.members:
            member.end_step()

    def check(self) -> None:
        """Let all of them check."""
        for member in self.members:
            member.check()

    def vocabulary_sizes(self) -> tuple[int | None, ...]:
        """Return those of all."""
        return tuple(size for member in self.members for size in member.vocabulary_sizes())

    def fingerprint(self) -> str:
        """Return those of all."""
        found = [member.fingerprint() for member in self.members]
        return " ".join(found if self.ordered else sorted(found))

    def describe(self) -> str:
        """Return what they are."""
        return " and ".join(member.describe() for member in self.members)


@contextmanager
def frozen_models(teacher: Teacher) -> Iterator[None]:
    """Keep every model of a teacher in eval mode, without gradients; the student itself is left alone."""
    members = teacher.members if isinstance(teacher, Ensemble) else [teacher]
    with ExitStack() as undo:
        for member in members:
            if isinstance(member, LiveTeacher) and not isinstance(member, UnmaskedStudent):
                undo.enter_context(frozen(member.model))
        yield
