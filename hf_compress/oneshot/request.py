"""One request to prune without training, and all that is needed to carry it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import WEIGHTS, PruningConfig
from hf_compress.errors import TargetError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.select import limits_of, select
from hf_compress.latency.budget import budget_for
from hf_compress.oneshot.calibration import Calibration
from hf_compress.oneshot.linear import LinearLayer, Undo, linear_layer
from hf_compress.pruning.allocate import Layer, allocate, check_reachable
from hf_compress.pruning.whole_model import limits_of_layers


@dataclass(frozen=True, eq=False)
class Targets:
    """What a config is for."""

    groups: Mapping[str, Sequence[DimensionGroup]]
    """Dimension groups by structure."""

    modules: Sequence[str]
    """Modules whose single weights are to go."""

    def all_groups(self) -> dict[str, DimensionGroup]:
        """Return the groups of all structures by name."""
        return {group.name: group for groups in self.groups.values() for group in groups}


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A request, the model, and what there is to know about it."""

    config: PruningConfig
    model: PreTrainedModel
    graph: ModelGraph
    targets: Targets
    calibration: Calibration
    undo: Undo
    """Is told of every parameter before it changes."""

    def all_groups(self) -> dict[str, DimensionGroup]:
        """Return the groups of all structures by name."""
        return self.targets.all_groups()

    def layers(self) -> dict[str, LinearLayer]:
        """Return the layers whose single weights are to go, by name.

        Raises:
            TargetError: If one is no linear layer, shares its weight, or has weights that are not finite.
        """
        names = self.targets.modules
        found = {name: linear_layer(self.model, name, "PruningConfig.structures['weights']") for name in names}
        for name, layer in found.items():
            require_finite("weights", name, layer.weight())
        return found

    def sparsity(self, kind: str) -> float:
        """Return the fraction of a structure to remove."""
        assert isinstance(self.config.structures, Mapping)
        return self.config.structures[kind]

    def change(self, layer: LinearLayer, weight: Tensor) -> None:
        """Overwrite a layer's weight [outputs, inputs]; undone if anything fails later.

        Raises:
            TargetError: If the weight is not finite.
        """
        require_finite("new weights", layer.name, weight)
        self.undo.remember(layer.parameter)
        layer.set_weight(weight)

    def allocate(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose masks by scores of all groups, higher = keep.

        Raises:
            TargetError: If scores are not finite, or limits forbid what is asked for.
        """
        for name, values in scores.items():
            require_finite("scores", name, values)
        budget = budget_for(self.config, self.model, self.graph, None, lambda measure: measure())
        if budget is not None:
            every = {name: limits_of(group, self.config) for name, group in self.all_groups().items()}
            return budget.masks({name: scores[name] for name in every}, limits_of_layers(every), 1.0, last=True)
        masks: dict[str, Tensor] = {}
        for kind, groups in self.targets.groups.items():
            mine = {group.name: scores[group.name] for group in groups}
            limits = {group.name: limits_of(group, self.config) for group in groups}
            masks |= allocate(mine, self.sparsity(kind), limits, self.config.allocation)
        return masks

    def allocate_weights(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose masks of single weights by scores of all layers, of any shape, higher = keep."""
        flat = {name: values.flatten() for name, values in scores.items()}
        layers = {
            name: Layer(num_units=values.numel(), min_units=0, shape=str(values.shape))
            for name, values in scores.items()
        }
        masks = allocate(flat, self.sparsity(WEIGHTS), layers, self.config.allocation)
        return {name: mask.view(scores[name].shape) for name, mask in masks.items()}

    def floor(self, group: DimensionGroup) -> int:
        """Return how many units of a group stay at least."""
        return limits_of(group, self.config).floor()


def require_finite(what: str, name: str, values: Tensor) -> None:
    """Check numbers that decide what goes.

    Args:
        what: What they are, for the message.
        name: Of the group or the layer.
        values: The numbers.

    Raises:
        TargetError: If any is not finite.
    """
    count = int((~torch.isfinite(values)).sum())
    if count:
        raise TargetError(
            f"prune_oneshot: {count:,} of the {values.numel():,} {what} of {name!r} are not finite, so nothing says "
            "what may go. Check the model's weights (half precision may be too narrow), or exclude it."
        )


@dataclass(frozen=True, eq=False)
class Found:
    """What a criterion came to."""

    masks: dict[str, Tensor]
    """Bool [num_units] by group name, or of the parameter's shape by parameter name; True = keep."""

    scores: dict[str, Tensor]
    """Higher = keep; by group name, [num_units]."""


def find_targets(model: PreTrainedModel, graph: ModelGraph, config: PruningConfig) -> Targets:
    """Return what a config is for.

    Raises:
        TargetError: If the model lacks a structure, a group is frozen, a pattern matches nothing, or the limits forbid
            the sparsity.
    """
    groups: dict[str, Sequence[DimensionGroup]] = {}
    modules: list[str] = []
    for each in select(model, graph.groups, config):
        if each.kind == WEIGHTS:
            modules += [name for name, _ in each.modules]
        else:
            groups[each.kind] = each.groups
            if isinstance(config.structures, Mapping):
                limits = {group.name: limits_of(group, config) for group in each.groups}
                check_reachable(f"structures[{each.kind!r}]", config.structures[each.kind], limits, config.allocation)
    return Targets(groups, modules)
