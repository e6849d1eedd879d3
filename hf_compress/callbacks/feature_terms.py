"""A feature loss at work: which layers of two models it pairs, and what it comes to for every example."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
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
from hf_compress.instruments.left import LeftUnits
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
        self._candidates: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        """Of each stack, on the CPU and on the device."""
        candidates: Any = config.candidates
        self._dynamic = DynamicPairing(
            candidates=candidates, teacher_layers=config.teacher_layers, by=config.chosen_by, ordered=config.ordered
        )

    def wants(self) -> set[str]:
        """Return what a ``FeatureTap`` has to take for it."""
        if self.loss.reads == "relations":
            return {WANTED[each] for each in self.config.of}
        return {str(self.loss.reads)}

    def prepare(self, student: Features, teacher: Features, inputs: Mapping[str, Any], number: int = 0) -> None:
        """Check that there is something to compare, and make the projections that are needed; every rank must call it.

        Args:
            student: Its features in a pass in which all layers ran.
            teacher: Its features.
            inputs: What the student was called with.
            number: Of the teacher, if there are several.

        Raises:
            ConfigError: If layers cannot be paired.
            TrainingError: If features do not fit each other.
        """
        for stack, kind, own, theirs in self._parts(student, teacher):
            possible = self._pairs(stack, own, theirs)
            pairs = tuple((i, j) for i, j in possible if own[i] is not None and theirs[j] is not None)
            if len(pairs) < 1 + self.loss.successive:
                raise TrainingError(
                    f"distillation: {self.name!r} finds {len(pairs)} pairs of layers with {self.loss.reads} in the "
                    f"{stack} and needs {1 + self.loss.successive}. Pair other layers (layers={self.config.layers!r} "
                    "now), or set FeatureConfig.stack to another one."
                )
            self._check_positions(stack, pairs, own, theirs)
            if self.loss.needs_equal_width:
                self._fit(stack, kind, pairs, own, theirs, inputs, number)

    def losses(
        self,
        student: Features,
        teacher: Features,
        inputs: Mapping[str, Any],
        kept: Mapping[str, Sequence[bool]],
        left: LeftUnits,
        number: int = 0,
    ) -> Tensor:
        """Return the loss of every example, [batch]: the mean over pairs of layers, kinds and stacks.

        Layers that LayerDrop leaves out take no part; zeros if it leaves nothing.

        Args:
            student: Its features, with gradients.
            teacher: Its features.
            inputs: What the student was called with.
            kept: By stack, the layers of the student that are not pruned.
            left: Which heads and channels of the student are not pruned.
            number: Of the teacher, if there are several.

        Raises:
            TrainingError: If features do not fit each other, or pruning has left no pair of layers.
        """
        found, batch = [], 0
        for stack, kind, own, theirs in self._parts(student, teacher):
            batch = next(len(layer) for layer in theirs if layer is not None)
            if all(layer is None for layer in own):
                continue
            self._check_gradient(stack, own)
            own, channels = self._left_of(student.stacks[stack], own, (stack, kind, number), left)
            compare = partial(self._compare, self._masks(stack, inputs), channels, teacher)
            there = [kept[stack][i] and (layer is None or layer.numel() > 0) for i, layer in enumerate(own)]
            pick = self._dynamic_pairs if self.config.layers == DYNAMIC else self._given_pairs
            values = pick(stack, own, theirs, there, compare)
            if values is not None:
                found.append(values)
        return torch.stack(found).mean(0) if found else torch.zeros(batch)

    def _left_of(
        self, stack: Stack, own: Layers, part: tuple[str, str, int], left: LeftUnits
    ) -> tuple[Layers, dict[int, Tensor]]:
        """Return what is compared of features that have parts of pruned units, as those of the smaller model have none.

        Returns:
            The features, projected; and of those that are not, by their width now, which channels they are.
        """
        (name, kind, number) = part
        found: Layers = []
        channels: dict[int, Tensor] = {}
        for i, layer in enumerate(own):
            if layer is None:
                found.append(layer)
            elif self.loss.reads == "hidden_states":
                rows, mapped = left.channels(name, len(own), i, layer), self._map(name, kind, i, number)
                if mapped in self._projections.rates:
                    found.append(self._projections.apply(mapped, layer, rows))
                    continue
                found.append(_selected(layer, -1, rows))
                if rows is not None and channels.setdefault(len(rows), rows) is not rows:
                    raise TrainingError(
                        f"distillation: {self.name!r} compares layers of the {name} of which pruning has left other "
                        'channels each. Set projection="always", or prune no hidden channels.'
                    )
            else:
                seen = stack.attention[i]
                assert seen is not None
                if self.loss.reads == "attentions":
                    found.append(_selected(layer, 1, left.heads(seen, layer)))
                else:
                    rows = left.columns(seen, kind, getattr(seen, kind))
                    found.append(_selected(layer, -1, rows))
                    channels |= {} if rows is None else {len(rows): rows}
        return found, channels

    def _compare(
        self,
        mask_of: Callable[[Tensor], Tensor],
        channels: Mapping[int, Tensor],
        teacher: Features,
        own: Any,
        theirs: Any,
    ) -> Tensor:
        """Return what layers cost, [batch]; of a teacher as wide as the student was, the same channels are compared."""
        first = own[0] if self.loss.successive else own
        rows = channels.get(first.shape[-1]) if self.loss.needs_equal_width else None
        if rows is not None:
            wide = theirs if self.loss.successive else (theirs,)
            cut = tuple(each.index_select(-1, rows) for each in wide)
            theirs = cut if self.loss.successive else cut[0]
        return self.loss(own, theirs, mask_of(first), **self._options(teacher, first, channels))

    def _check_gradient(self, stack: str, own: Layers) -> None:
        if torch.is_grad_enabled() and not any(layer.requires_grad for layer in own if layer is not None):
            compared = [i for i, layer in enumerate(own) if layer is not None]
            raise TrainingError(
                f"distillation: {self.name!r} has no effect: layers {compared} of the student's {stack} get no "
                "gradient, because everything up to them is frozen. Compare later layers, or train earlier ones."
            )

    def _parts(self, student: Features, teacher: Features) -> list[tuple[str, str, Layers, Layers]]:
        """Return (stack, kind, layers of the student, layers of the teacher) for everything compared."""
        kinds = self.config.of if self.loss.reads == "relations" else ("",)
        stacks = [self.config.stack] if self.config.stack is not None else list(student.stacks)
        return [self._part(name, kind, student, teacher) for name in stacks for kind in kinds]

    def _part(self, name: str, kind: str, student: Features, teacher: Features) -> tuple[str, str, Layers, Layers]:
        mine, others = _stack(name, student, "student"), _stack(name, teacher, "teacher")
        pairs = self._pairs(name, range(mine.num_layers), range(others.num_layers))
        own = self._layers(mine, kind, {i for i, _ in pairs})
        device = next((layer.device for layer in own if layer is not None), None)
        theirs = self._layers(others, kind, {j for _, j in pairs})
        return name, kind, own, [None if layer is None else layer.to(device) for layer in theirs]

    def _layers(self, stack: Stack, kind: str, wanted: Collection[int]) -> Layers:
        """Return what is compared of the wanted layers; None for the others."""
        if self.loss.reads == "hidden_states":
            return [each if i in wanted else None for i, each in enumerate(stack.hidden)]
        present = [each if i in wanted else None for i, each in enumerate(stack.attention)]
        if self.loss.reads == "attentions":
            return [None if each is None else each.probabilities() for each in present]
        heads = [None if each is None else getattr(each, kind) for each in present]
        return [None if each is None else each.transpose(1, 2).flatten(2) for each in heads]

    def _options(self, teacher: Features, own: Tensor, channels: Mapping[int, Tensor]) -> dict[str, Any]:
        options = dict(self.config.options)
        if "relation_heads" in self.loss.options and "relation_heads" not in options:
            seen = [each for stack in teacher.stacks.values() for each in stack.attention if each is not None]
            first = next(x for each in seen for x in (each.query, each.key, each.value) if x is not None)
            heads, width = first.shape[1], own.shape[-1]
            # Pruned heads may leave a width that the teacher's number of heads does not divide.
            options["relation_heads"] = math.gcd(heads, width) if width in channels else heads
        return options

    def _masks(self, stack: str, inputs: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        """Return what gives the mask of a feature; layers may differ in their number of positions."""
        known: dict[int, Tensor] = {}

        def mask_of(feature: Tensor) -> Tensor:
            number = feature.shape[-2]
            if number not in known:
                like = feature.transpose(1, 2) if self.loss.reads == "attentions" else feature
                known[number] = position_mask(self._student, stack, inputs, like)
            return known[number]

        return mask_of

    def _check_positions(self, stack: str, pairs: Pairs, own: Layers, theirs: Layers) -> None:
        for i, j in pairs:
            mine, other = own[i], theirs[j]
            if mine is not None and other is not None and mine.shape[-2] != other.shape[-2]:
                asked = "candidates as {student: [teacher, ...]}" if self.config.layers == DYNAMIC else "other layers"
                raise TrainingError(
                    f"distillation: {self.name!r} cannot compare layer {i} of the student's {stack}, which has "
                    f"{mine.shape[-2]} positions, with the teacher's layer {j}, which has {other.shape[-2]}. Give "
                    f"{asked}, or a teacher that gets the same inputs."
                )
        lengths = {layer.shape[-2] for i, _ in pairs if (layer := own[i]) is not None}
        if self.loss.successive and len(lengths) > 1:
            raise TrainingError(
                f"distillation: {self.name!r} compares a layer with the next, but those of the student's {stack} have "
                f"unequal numbers of positions, {sorted(lengths)}. Pair layers of equal ones, or use another loss."
            )

    def _check_widths(self, stack: str, pairs: Pairs, theirs: Layers) -> None:
        """Check that each layer of the student has one width to be brought to."""
        widths: dict[int, set[int]] = {}
        for i, j in pairs:
            if (other := theirs[j]) is not None:
                widths.setdefault(i, set()).add(other.shape[-1])
        for i, found in widths.items():
            if len(found) > 1:
                raise TrainingError(
                    f"distillation: {self.name!r} may pair layer {i} of the student's {stack} with layers of the "
                    f"teacher that are {sorted(found)} wide, and a layer is projected to one width. Give candidates as "
                    "{student: [teacher, ...]} of equal width for each, or use a loss that compares any widths."
                )

    def _fit(
        self, stack: str, kind: str, pairs: Pairs, own: Layers, theirs: Layers, inputs: Mapping[str, Any], number: int
    ) -> None:
        self._check_widths(stack, pairs, theirs)
        mask_of, usual = self._masks(stack, inputs), self._fixed_pairs(len(own), len(theirs))
        start = dict(reversed(pairs)) | {i: j for i, j in usual if (i, j) in pairs}
        for i, j in sorted(start.items()):
            mine, other = own[i], theirs[j]
            if mine is None or other is None:
                continue
            if self.config.projection == "always" or mine.shape[-1] != other.shape[-1]:
                name = self._map(stack, kind, i, number)
                self._projections.fit(name, mine, other, mask_of(mine), self.config.learning_rate)

    def _map(self, stack: str, kind: str, layer: int, number: int) -> str:
        teacher = f"teacher {number}" if number else ""
        return ".".join(part for part in (self.name, stack, kind, str(layer), teacher) if part)

    def _pairs(self, stack: str, own: Sequence[Any], theirs: Sequence[Any]) -> Pairs:
        """Return the pairs that may be compared."""
        if self.config.layers != DYNAMIC:
            return self._fixed_pairs(len(own), len(theirs))
        allowed = self._candidate_mask(stack, len(own), len(theirs), torch.device("cpu"))[0]
        return tuple((i, j) for i, j in allowed.nonzero().tolist())

    def _fixed_pairs(self, num_student: int, num_teacher: int) -> Pairs:
        """Return pairs; for dynamic ones those that projections start from."""
        how: Any = "uniform" if self.config.layers == DYNAMIC else self.config.layers
        if self.config.layers == DYNAMIC and num_student > num_teacher:
            return tuple((i, min(i * num_teacher // num_student, num_teacher - 1)) for i in range(num_student))
        return pair_layers(how, num_student, num_teacher)

    def _given_pairs(
        self, stack: str, own: Layers, theirs: Layers, kept: Sequence[bool], compare: Compare
    ) -> Tensor | None:
        pairs = [(i, j) for i, j in self._fixed_pairs(len(own), len(theirs)) if kept[i] and theirs[j] is not None]
        if len(pairs) < 1 + self.loss.successive:
            raise self._nothing_left(stack)
        pairs = [(i, j) for i, j in pairs if own[i] is not None]
        if self.loss.successive:
            values = [compare((own[i], own[k]), (theirs[j], theirs[m])) for (i, j), (k, m) in itertools.pairwise(pairs)]
        else:
            values = [compare(own[i], theirs[j]) for i, j in pairs]
        return torch.stack(values).mean(0) if values else None

    def _dynamic_pairs(
        self, stack: str, own: Layers, theirs: Layers, kept: Sequence[bool], compare: Compare
    ) -> Tensor | None:
        device = next(layer.device for layer in own if layer is not None)
        allowed, candidates = self._candidate_mask(stack, len(own), len(theirs), device)
        rows = [i for i, there in enumerate(kept) if there and bool(allowed[i].any())]
        if not rows:
            raise self._nothing_left(stack)
        mine = {i: layer for i in rows if (layer := own[i]) is not None}
        others = {j: layer for j, layer in enumerate(theirs) if layer is not None}
        if not mine or not bool(allowed[list(mine)][:, list(others)].any()):
            return None
        if len(mine) < len(own) or len(others) < len(theirs):
            candidates = candidates[list(mine)][:, list(others)]
        # One pair is chosen on the device, so it is read by a tensor. What cannot be stacked is compared at once.
        stacks = all(len({layer.shape for layer in each.values()}) == 1 for each in (mine, others))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stacks):
            some = next(compare(mine[i], others[j]) for i in mine for j in others if allowed[i, j])
            costs = torch.stack(
                [
                    torch.stack([compare(a, b) if allowed[i, j] else torch.zeros_like(some) for j, b in others.items()])
                    for i, a in mine.items()
                ]
            )
        choice = self._dynamic.choose(costs.detach().mean(-1), candidates)
        if stacks:
            chosen = (
                torch.stack(list(mine.values()))[choice.student],
                torch.stack(list(others.values()))[choice.teacher],
            )
            values = torch.stack([compare(a, b) for a, b in zip(*chosen, strict=True)])
        else:
            values = costs[choice.student, choice.teacher]
        used = choice.used & choice.possible
        return (values * used[:, None]).sum(0) / used.sum().clamp(min=1)

    def _candidate_mask(
        self, stack: str, num_student: int, num_teacher: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        key = (stack, num_student, num_teacher)
        known = self._candidates.get(key)
        if known is None or known[1].device != device:
            mask = self._dynamic.candidate_mask(num_student, num_teacher) if known is None else known[0]
            known = self._candidates[key] = (mask, mask.to(device))
        return known

    def _nothing_left(self, stack: str) -> TrainingError:
        return TrainingError(
            f"distillation: {self.name!r} has no pair of layers left in the {stack}: pruning has taken all of the "
            f"student's out. Pair more layers (layers={self.config.layers!r} now), or prune fewer."
        )


def _selected(layer: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return layer if index is None else layer.index_select(dim, index)


def _stack(name: str, features: Features, who: str) -> Stack:
    if name not in features.stacks:
        raise TrainingError(
            f"distillation: the {who} has no {name} whose layers can be compared; it has {sorted(features.stacks)}. "
            "Set FeatureConfig.stack to one that both have."
        )
    return features.stacks[name]
