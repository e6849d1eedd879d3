"""The allocations among which a search chooses: from a share for every group to masks that meet the target."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import PruningConfig
from hf_compress.errors import ConfigError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.gate import check_gateable
from hf_compress.instruments.limits import limits_of
from hf_compress.instruments.select import select
from hf_compress.instruments.units import GroupEvidence
from hf_compress.pruning.allocate import allocate, bundles, check_reachable
from hf_compress.pruning.method import CurrentMethod, Setting
from hf_compress.pruning.whole_model import CostBudget
from hf_compress.registry import criteria

Masks = dict[str, Tensor]
Shares = Sequence[float]
"""What each bundle keeps of its units, before all are moved alike to meet the target."""


class Allocations:
    """Masks as a function of how the units that stay are shared out among the groups.

    Args:
        model: The model, to score units by their weights.
        graph: What is known about it.
        config: Structures with sparsities, or structures and ``target_params``; limits; the criterion.
        scores: By group name, [num_units], higher = keep; None: those of the config's criterion.

    Raises:
        TargetError: If the model lacks what is asked for, or limits forbid it.
        ConfigError: If the scores are not those of the groups.
    """

    def __init__(
        self, model: PreTrainedModel, graph: ModelGraph, config: PruningConfig, scores: Mapping[str, Tensor] | None
    ) -> None:
        chosen = select(model, graph.groups, config)
        self.groups = {group.name: group for each in chosen for group in each.groups}
        check_gateable(model, list(self.groups.values()))
        self._limits = {each.kind: limits_of(each.groups, config) for each in chosen}
        self._layers = {name: layer for layers in self._limits.values() for name, layer in layers.items()}
        self.bundles = [each.names for layers in self._limits.values() for each in bundles(layers)]
        """Groups that keep the same share; most are alone."""

        self._sparsities = dict(config.structures) if isinstance(config.structures, Mapping) else None
        self._budget: CostBudget | None = None
        target = config.target()
        if target is not None:
            self._cost = graph.costs.parameters
            self._budget = CostBudget(target[0], self._cost, target[1])
            self._prices = {name: self._price(group) for name, group in self.groups.items()}
        if self._sparsities is not None:
            for kind, layers in self._limits.items():
                check_reachable(f"structures[{kind!r}]", self._sparsities[kind], layers, "global")
        self._ranks = _ranks(self.groups, _scores(model, self.groups, config.criterion, scores))

    def _price(self, group: DimensionGroup) -> float:
        half = group.num_units // 2
        return (self._cost({}) - self._cost({group.name: half})) / (group.num_units - half)

    def start(self) -> list[float]:
        """Return the shares of which every group keeps the same."""
        return [1.0] * len(self.bundles)

    def masks(self, shares: Shares) -> Masks:
        """Return the masks that keep these shares, all raised or lowered alike as far as the target asks for.

        The lowest scores of each group go.

        Args:
            shares: One for each of ``bundles``.

        Returns:
            Group name -> bool [num_units], True = keep.
        """
        values = {}
        for names, share in zip(self.bundles, shares, strict=True):
            for name in names:
                # Where all units above a common threshold stay, every group keeps its share less the threshold.
                values[name] = share - (self._ranks[name].double() + 0.5) / len(self._ranks[name])
        if self._sparsities is None:
            return self._within_budget(values)
        found: Masks = {}
        for kind, layers in self._limits.items():
            mine = {name: values[name] for name in layers}
            found |= allocate(mine, self._sparsities[kind], layers, "global")
        return found

    def _within_budget(self, values: Mapping[str, Tensor]) -> Masks:
        """Let the units of the highest value per cost stay, whatever a unit costs."""
        assert self._budget is not None
        lowest = min(float(value.min()) for value in values.values())
        priced = {name: (value - lowest) * self._prices[name] for name, value in values.items()}
        return self._budget.masks(priced, self._layers, 1.0, last=True)

    def shares(self, masks: Masks) -> list[float]:
        """Return what each of ``bundles`` keeps of its units."""
        return [float(masks[names[0]].double().mean()) for names in self.bundles]


def _scores(
    model: PreTrainedModel,
    groups: Mapping[str, DimensionGroup],
    criterion: str,
    given: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    if given is None:
        method = criteria.get(criterion)
        assert issubclass(method, CurrentMethod)
        ranking = method(method.options(), Setting())
        return {name: ranking.score(name, GroupEvidence(group, model)).cpu() for name, group in groups.items()}
    different = sorted(given.keys() ^ groups.keys())
    if different:
        where = "a group that is not searched" if different[0] in given else "missing"
        raise ConfigError(
            f"simulated_annealing: criterion[{different[0]!r}] is {where}; allowed: scores of exactly these groups: "
            f"{', '.join(repr(name) for name in groups)}."
        )
    for name, score in given.items():
        if tuple(score.shape) != (groups[name].num_units,) or not bool(torch.isfinite(score).all()):
            raise ConfigError(
                f"simulated_annealing: criterion[{name!r}] has shape {tuple(score.shape)}, or values that are not "
                f"finite; allowed: {groups[name].num_units} finite numbers."
            )
    return {name: given[name].detach().cpu() for name in groups}


def _ranks(groups: Mapping[str, DimensionGroup], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every unit's place, 0 for the one to keep first, among equal ones the first."""
    found = {}
    for name, score in scores.items():
        values = score.double().clone()
        values[list(groups[name].fixed_units)] = math.inf
        order = values.argsort(descending=True, stable=True)
        found[name] = torch.empty_like(order)
        found[name][order] = torch.arange(len(order))
    return found
