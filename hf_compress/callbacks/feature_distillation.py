"""All feature losses of a run: what they watch in the student, their projections, and what they come to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_compress.callbacks.base import Run
from hf_compress.callbacks.feature_terms import FeatureTerm
from hf_compress.callbacks.projections import Projections
from hf_compress.callbacks.ramps import value_at
from hf_compress.config import FeatureConfig
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.attach import attachment_of
from hf_compress.instruments.features import Features, FeatureTap
from hf_compress.instruments.left import LeftUnits
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
        self.is_ready = False
        """Whether projections are made."""
        self._stored: Mapping[str, Tensor] | None = None
        self._kept: dict[str, list[bool]] = {}
        self._left: LeftUnits | None = None
        self._kept_at = -1

    @staticmethod
    def wants(configs: Sequence[FeatureConfig]) -> frozenset[str]:
        """Return what a ``FeatureTap`` has to take from student and teacher."""
        unbound = (FeatureTerm("", each, torch.nn.Identity(), Projections()) for each in configs)
        return frozenset(want for term in unbound for want in term.wants())

    def prepare(self, student: Features, teachers: Sequence[Features], inputs: Mapping[str, Any]) -> None:
        """Check that there is something to compare, and make projections; all ranks must call it.

        Args:
            student: Features of the student in a pass in which all layers ran.
            teachers: Those of each teacher.
            inputs: What the student was called with.

        Raises:
            ConfigError: If layers cannot be paired, or a setting has no effect.
            TrainingError: If features are missing or do not fit each other.
        """
        for term in self.terms:
            for number, features in enumerate(teachers):
                term.prepare(student, features, inputs, number)
            has_maps = any(name.startswith(f"{term.name}.") for name in self.projections.rates)
            if term.config.learning_rate != FeatureConfig.learning_rate and not has_maps:
                raise ConfigError(
                    f"FeatureConfig.learning_rate: got {term.config.learning_rate}; allowed: "
                    f"{FeatureConfig.learning_rate} for {term.name!r}, which needs no projections, since the widths "
                    'are equal. Leave it out, or set projection="always".'
                )
        self.is_ready = True
        if self._stored is not None:
            self.projections.restore(self._stored)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the projections of a checkpoint, at once or when they are made.

        Raises:
            TrainingError: If some are missing, or are of other sizes.
        """
        if self.is_ready:
            self.projections.restore(tensors)
        else:
            self._stored = tensors

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
        left = self._left
        assert left is not None
        for term in self.terms:
            each = [term.losses(student, other, inputs, kept, left, number) for number, other in enumerate(teachers)]
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

    def forget_masks(self) -> None:
        """Ask anew what is pruned: masks may have come from a checkpoint."""
        self._kept_at = -1

    def _kept_layers(self, student: Features) -> Mapping[str, Sequence[bool]]:
        """Return which layers are not pruned, and note which units are left.

        Asked once a step, because it waits for the device.
        """
        step = self.run.trainer.state.global_step
        if step != self._kept_at:
            self._kept_at = step
            model: Any = self.run.model
            self._left = LeftUnits(model)
            pruned = any(each is not None and each.layer is not None for each in map(attachment_of, model.modules()))
            self._kept = {
                name: kept_layers(model, name, stack.num_layers) if pruned else [True] * stack.num_layers
                for name, stack in student.stacks.items()
            }
        return self._kept
