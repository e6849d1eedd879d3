"""All feature losses of a run: what they watch in the student, their projections, and what they come to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_compress.callbacks.base import Run
from hf_compress.callbacks.feature_terms import FeatureTerm
from hf_compress.callbacks.heads import Head
from hf_compress.callbacks.preview import first_batch, unchanged
from hf_compress.callbacks.projections import Projections
from hf_compress.callbacks.ramps import value_at
from hf_compress.callbacks.teachers import Teacher
from hf_compress.config import FeatureConfig
from hf_compress.errors import TrainingError
from hf_compress.instruments.attach import attachment_of
from hf_compress.instruments.features import Features, FeatureTap
from hf_compress.instruments.stacks import kept_layers


class FeatureDistillation:
    """The terms that a config asks for.

    Args:
        configs: One for each term.
        run: The run.
    """

    def __init__(self, configs: Sequence[FeatureConfig], run: Run) -> None:
        self.run = run
        self.projections = Projections()
        model: Any = run.trainer.model
        names = [each.loss for each in configs]
        several = {name for name, number in Counter(names).items() if number > 1}
        self.terms = [
            FeatureTerm(f"{each.loss}_{i}" if each.loss in several else each.loss, each, model, self.projections)
            for i, each in enumerate(configs)
        ]
        self.tap = FeatureTap(model, self.wants(configs))
        self._kept: dict[str, list[bool]] = {}
        self._kept_at = -1

    @staticmethod
    def wants(configs: Sequence[FeatureConfig]) -> frozenset[str]:
        """Return what a ``FeatureTap`` has to take from student and teacher."""
        unbound = (FeatureTerm("", each, torch.nn.Identity(), Projections()) for each in configs)
        return frozenset(want for term in unbound for want in term.wants())

    def prepare(self, teacher: Teacher, head: Head) -> None:
        """Compare the first batch, so that errors come before training, and make projections; all ranks must call it.

        Raises:
            ConfigError: If layers cannot be paired.
            TrainingError: If features are missing or do not fit each other.
        """
        self.tap.check_checkpointing()
        model: Any = self.run.trainer.model
        inputs = first_batch(self.run.trainer)
        with torch.no_grad(), unchanged(model), torch.random.fork_rng(), self.run.trainer.accelerator.autocast():
            student = self.of(model.eval(), inputs)
            lesson = teacher.teach(inputs, head)
            teacher.check()
            for term in self.terms:
                for number, features in enumerate(lesson.features):
                    term.prepare(student, features, inputs, number)
            self.losses(student, lesson.features, inputs, torch.ones(0))
        self._kept_at = -1  # masks may come from a checkpoint after this

    def of(self, model: Any, inputs: Mapping[str, Any]) -> Features:
        """Return the features of the student for some inputs."""
        try:
            return self.tap.read(model(**self.tap.prepare(inputs)))
        finally:
            self.tap.close()

    def losses(
        self, student: Features, teachers: Sequence[Features], inputs: Mapping[str, Any], shares: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss of every term by name, its weight included.

        Args:
            student: Features of the student.
            teachers: Those of each teacher; what each demands is averaged.
            inputs: What the student was called with.
            shares: Part of each example in the loss, [batch]; empty for equal parts.
        """
        found, kept = {}, self._kept_layers(student)
        for term in self.terms:
            each = [term.losses(student, other, inputs, kept, number) for number, other in enumerate(teachers)]
            values = torch.stack(each).mean(0)
            if shares.numel() == 0:
                shares = torch.full((len(values),), 1 / len(values), device=values.device)
            values = values.to(shares.device)
            if len(values) % len(shares) != 0:
                raise TrainingError(
                    f"distillation: features of {len(values)} texts belong to {len(shares)} examples, and it is not "
                    "known which to which. Distill logits only."
                )
            per_example = values.reshape(len(shares), -1).mean(1)  # several texts where there are choices
            found[term.name] = value_at(term.config.weight, self.run) * (per_example * shares).sum()
        return found

    def _kept_layers(self, student: Features) -> Mapping[str, Sequence[bool]]:
        """Return which layers are not pruned; asked once a step, because it waits for the device."""
        step = self.run.trainer.state.global_step
        if step != self._kept_at:
            self._kept_at = step
            model: Any = self.run.model
            pruned = any(each is not None and each.layer is not None for each in map(attachment_of, model.modules()))
            self._kept = {
                name: kept_layers(model, name, stack.num_layers) if pruned else [True] * stack.num_layers
                for name, stack in student.stacks.items()
            }
        return self._kept
