"""A feature loss at work: which layers of two models it pairs, and what it comes to for every example."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.callbacks.projections import Projections
from hf_compress.config.distillation import DYNAMIC, FeatureConfig
from hf_compress.distillation.dynamic import DynamicPairing
from hf_compress.distillation.losses import FeatureLoss
from hf_compress.distillation.pairing import Pairs, pair_layers
from hf_compress.errors import TrainingError
from hf_compress.instruments.features import Features, Stack
from hf_compress.instruments.stacks import position_mask
from hf_compress.registry import distillation_losses

WANTED = {"query": "queries", "key": "keys", "value": "values"}

Layers = list[Tensor | None]
"""One kind of feature of every layer; None where a layer has none in this pass."""

Compare = Callable[[Any, Any], Tensor]
"""(features of the student, of the teacher) -> [batch]."""


class FeatureTerm:
    """One ``FeatureConfig`` for two models.

    Args:
        name: Tells terms apart, in logs and in the names of projections.
        config: What to compare.
        student: The model that learns.
        projections: Where maps between widths are kept.
    """

    def __init__(self, name: str, config: FeatureConfig, student: nn.Module, projections: Projections) -> None:
        self.name = name
        self.config = config
        self.loss: FeatureLoss = distillation_losses.get(config.loss)
        self._student = student
        self._projections = projections
        self._candidates: dict[tuple[str, int, int], Tensor] = {}
        candidates: Any = config.candidates
        self._dynamic = DynamicPairing(
            candidates=candidates, teacher_layers=config.teacher_layers, by=config.chosen_by, ordered=config.ordered
        )

    def wants(self) -> set[str]:
        """Return what a ``FeatureTap`` has to take for it."""
        if self.loss.reads == "relations":
            return {WANTED[each] for each in self.config.of}
        return {str(self.loss.reads)}

    def prepare(self, student: Features, teacher: Features, inputs: Mapping[str, Any]) -> None:
        """Make the projections that are needed; every rank must call it.

        Raises:
            ConfigError: If layers cannot be paired.
            TrainingError: If features do not fit each other.
        """
        if not self.loss.needs_equal_width:
            return
        for stack, kind, own, theirs in self._parts(student, teacher):
            mask = self._mask(stack, inputs, own)
            for i, j in self._fixed_pairs(len(own), len(theirs)):
                mine, other = own[i], theirs[j]
                if mine is None or other is None:
                    continue
                if self.config.projection == "always" or mine.shape[-1] != other.shape[-1]:
                    name = self._map(stack, kind, i)
                    self._projections.fit(name, mine, other, mask, self.config.learning_rate)

    def losses(
        self, student: Features, teacher: Features, inputs: Mapping[str, Any], kept: Mapping[str, Sequence[bool]]
    ) -> Tensor:
        """Return the loss of every example, [batch]: the mean over pairs of layers, kinds and stacks.

        Args:
            student: Its features, with gradients.
            teacher: Its features.
            inputs: What the student was called with.
            kept: By stack, the layers of the student that are not pruned.

        Raises:
            TrainingError: If features do not fit each other, or no pair of layers is left.
        """
        found = []
        for stack, kind, own, theirs in self._parts(student, teacher):
            mask = self._mask(stack, inputs, own)
            present = [there and layer is not None for there, layer in zip(kept[stack], own, strict=True)]

            def compare(mine: Any, other: Any, mask: Tensor = mask) -> Tensor:
                return self.loss(mine, other, mask, **self._options(teacher))

            own = [
                None if layer is None else self._projected(self._map(stack, kind, i), layer)
                for i, layer in enumerate(own)
            ]
            pick = self._dynamic_pairs if self.config.layers == DYNAMIC else self._given_pairs
            found.append(pick(stack, own, theirs, present, compare))
        return torch.stack(found).mean(0)

    def _parts(self, student: Features, teacher: Features) -> list[tuple[str, str, Layers, Layers]]:
        """Return (stack, kind, layers of the student, layers of the teacher) for everything compared."""
        kinds = self.config.of if self.loss.reads == "relations" else ("",)
        stacks = [self.config.stack] if self.config.stack is not None else list(student.stacks)
        return [self._part(name, kind, student, teacher) for name in stacks for kind in kinds]

    def _part(self, name: str, kind: str, student: Features, teacher: Features) -> tuple[str, str, Layers, Layers]:
        own = self._layers(_stack(name, student, "student"), kind)
        device = next((layer.device for layer in own if layer is not None), None)
        theirs = self._layers(_stack(name, teacher, "teacher"), kind)
        return name, kind, own, [None if layer is None else layer.to(device) for layer in theirs]

    def _layers(self, stack: Stack, kind: str) -> Layers:
        if self.loss.reads == "hidden_states":
            return list(stack.hidden)
        if self.loss.reads == "attentions":
            return [None if each is None else each.probabilities() for each in stack.attention]
        heads = [None if each is None else getattr(each, kind) for each in stack.attention]
        return [None if each is None else each.transpose(1, 2).flatten(2) for each in heads]

    def _options(self, teacher: Features) -> dict[str, Any]:
        options = dict(self.config.options)
        if "relation_heads" in self.loss.options and "relation_heads" not in options:
            seen = [each for stack in teacher.stacks.values() for each in stack.attention if each is not None]
            first = next(x for each in seen for x in (each.query, each.key, each.value) if x is not None)
            options["relation_heads"] = first.shape[1]
        return options

    def _mask(self, stack: str, inputs: Mapping[str, Any], layers: Layers) -> Tensor:
        like = next((layer for layer in layers if layer is not None), None)
        if like is None:
            raise TrainingError(f"distillation: no layer of the student's {stack} ran, so {self.name!r} has no effect.")
        if self.loss.reads == "attentions":
            like = like.transpose(1, 2)
        return position_mask(self._student, stack, inputs, like)

    def _map(self, stack: str, kind: str, layer: int) -> str:
        return ".".join(part for part in (self.name, stack, kind, str(layer)) if part)

    def _projected(self, name: str, layer: Tensor) -> Tensor:
        return self._projections.apply(name, layer) if name in self._projections.rates else layer

    def _fixed_pairs(self, num_student: int, num_teacher: int) -> Pairs:
        """Return pairs; for dynamic ones those that projections start from."""
        how: Any = "uniform" if self.config.layers == DYNAMIC else self.config.layers
        if self.config.layers == DYNAMIC and num_student > num_teacher:
            return tuple((i, min(i * num_teacher // num_student, num_teacher - 1)) for i in range(num_student))
        return pair_layers(how, num_student, num_teacher)

    def _given_pairs(
        self, stack: str, own: Layers, theirs: Layers, present: Sequence[bool], compare: Compare
    ) -> Tensor:
        pairs = [(i, j) for i, j in self._fixed_pairs(len(own), len(theirs)) if present[i] and theirs[j] is not None]
        if self.loss.successive:
            values = [compare((own[i], own[k]), (theirs[j], theirs[m])) for (i, j), (k, m) in itertools.pairwise(pairs)]
        else:
            values = [compare(own[i], theirs[j]) for i, j in pairs]
        if not values:
            raise TrainingError(
                f"distillation: {self.name!r} has no pair of layers left in the {stack}: pruning or LayerDrop has "
                f"taken all of the student's out. Pair more layers (layers={self.config.layers!r} now)."
            )
        return torch.stack(values).mean(0)

    def _dynamic_pairs(
        self, stack: str, own: Layers, theirs: Layers, present: Sequence[bool], compare: Compare
    ) -> Tensor:
        mine = [layer for layer, there in zip(own, present, strict=True) if there and layer is not None]
        others = [layer for layer in theirs if layer is not None]
        if not mine or len(others) != len(theirs):
            raise TrainingError(f"distillation: {self.name!r} finds no layers to pair in the {stack} in this pass.")
        where = [i for i, there in enumerate(present) if there]
        candidates = self._candidate_mask(stack, len(own), len(theirs), mine[0].device)[where]
        with torch.no_grad():
            costs = torch.stack([torch.stack([compare(a, b).mean() for b in others]) for a in mine])
        choice = self._dynamic.choose(costs, candidates)
        chosen_own, chosen_theirs = torch.stack(mine)[choice.student], torch.stack(others)[choice.teacher]
        values = [compare(a, b) for a, b in zip(chosen_own, chosen_theirs, strict=True)]
        used = choice.used & choice.possible
        return (torch.stack(values) * used[:, None]).sum(0) / used.sum().clamp(min=1)

    def _candidate_mask(self, stack: str, num_student: int, num_teacher: int, device: torch.device) -> Tensor:
        key = (stack, num_student, num_teacher)
        if key not in self._candidates:
            self._candidates[key] = self._dynamic.candidate_mask(num_student, num_teacher).to(device)
        return self._candidates[key]


def _stack(name: str, features: Features, who: str) -> Stack:
    if name not in features.stacks:
        raise TrainingError(
            f"distillation: the {who} has no {name} whose layers can be compared; it has {sorted(features.stacks)}. "
            "Set FeatureConfig.stack to one that both have."
        )
    return features.stacks[name]
