"""One request to prune without training, and all that is needed to carry it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.config import WEIGHTS, PruningConfig
from hf_compress.errors import TargetError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import limits_of
from hf_compress.instruments.select import Selection, kinds_of, select
from hf_compress.instruments.units import GroupEvidence
from hf_compress.instruments.weight_units import WeightEvidence
from hf_compress.oneshot.calibration import Calibration
from hf_compress.oneshot.linear import LinearLayer, Undo, linear_layer, own_layer
from hf_compress.pruning.allocate import Layer
from hf_compress.pruning.method import Method, Setting
from hf_compress.pruning.pools import Pool
from hf_compress.pruning.whole_model import Budget
from hf_compress.registry import criteria

WHAT = f"PruningConfig.structures[{WEIGHTS!r}]"


@dataclass(frozen=True, eq=False)
class Found:
    """What a criterion came to."""

    masks: dict[str, Tensor]
    """Bool [num_units] by group name, or of the parameter's shape by parameter name; True = keep."""

    scores: dict[str, Tensor]
    """Higher = keep; by group name, [num_units]."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Targets:
    """What a config is for: pools, and what their layers are."""

    pools: Sequence[Pool]
    groups: Mapping[str, DimensionGroup]
    """By name."""

    weights: Mapping[str, WeightEvidence]
    """By name of the parameter."""

    modules: Mapping[str, nn.Module]
    """Those with these parameters, by name of the module."""


@dataclass(frozen=True, eq=False)
class Job:
    """The parts of a request with one criterion and its options, the model, and what there is to know about it."""

    config: PruningConfig
    """Criterion and options; what else holds for a part is in its pool."""

    pools: Sequence[Pool]
    """Those of this criterion with these options."""

    model: PreTrainedModel
    graph: ModelGraph
    targets: Targets
    calibration: Calibration
    undo: Undo
    """Is told of every parameter before it changes."""

    seed: int
    """Of what is random."""

    @cached_property
    def groups(self) -> dict[str, DimensionGroup]:
        """The dimension groups of all pools by name."""
        known = self.targets.groups
        return {name: known[name] for pool in self.pools for name in pool.layers if name in known}

    def limits(self) -> dict[str, Layer]:
        """Return what an allocation must respect of each layer."""
        return {name: layer for pool in self.pools for name, layer in pool.layers.items()}

    def method(self) -> Method:
        """Return the criterion as it works while training.

        Where it reads weights alone, or is told what it would have read, it scores as it does there.
        """
        method: Method = criteria.get(self.config.criterion)(self.config.method_options(), Setting(seed=self.seed))
        return method

    def evidence(self) -> dict[str, GroupEvidence | WeightEvidence]:
        """Return what there is to know about the weights of all layers."""
        found: dict[str, GroupEvidence | WeightEvidence] = {}
        for name in self.limits():
            group = self.groups.get(name)
            found[name] = self.targets.weights[name] if group is None else GroupEvidence(group, self.model)
        return found

    def linear_layers(self) -> dict[str, LinearLayer]:
        """Return the layers whose single weights are to go, by name of the module.

        Raises:
            TargetError: If one is no linear layer.
        """
        mine = self.limits()
        names = [name for name in self.targets.modules if f"{name}.weight" in mine]
        return {name: linear_layer(self.model, name, WHAT) for name in names}

    def pool_of(self, layer: str) -> Pool:
        """Return the pool of a layer."""
        return next(pool for pool in self.pools if layer in pool.layers)

    def change(self, name: str, parameter: nn.Parameter, values: Tensor) -> None:
        """Overwrite a parameter; undone if anything fails later.

        Args:
            name: Of its module, for messages.
            parameter: The parameter.
            values: Of the same shape.

        Raises:
            TargetError: If they are not finite.
        """
        require_finite("new weights", name, values)
        self.undo.remember(parameter)
        with torch.no_grad():
            parameter.copy_(values)

    def allocate(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose what stays by scores of all layers, [num_units], higher = keep.

        Raises:
            TargetError: If scores are not finite, or limits forbid what is asked for.
        """
        masks: dict[str, Tensor] = {}
        for pool in self.pools:
            mine = {name: scores[name].detach().cpu() for name in pool.layers}
            for name, values in mine.items():
                require_finite("scores", name, values)
            if pool.budget is not None:
                whole = {name: torch.ones(len(values), dtype=torch.bool) for name, values in mine.items()}
                masks |= pool.within_budget(mine, whole, 1.0, last=True)
            else:
                assert pool.sparsity is not None
                masks |= pool.allocate(mine, pool.sparsity)
        return masks


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


def find_targets(model: PreTrainedModel, graph: ModelGraph, config: PruningConfig, budget: Budget | None) -> Targets:
    """Return what a config is for.

    Args:
        model: The model.
        graph: What is known about it.
        config: The config.
        budget: Of the whole model, if the config has one: then all structures compete with each other.

    Raises:
        TargetError: If the model lacks a structure, a group is frozen, a pattern matches nothing, weights are shared
            or not finite, or the limits forbid the sparsity.
    """
    chosen = select(model, graph.groups, config)
    modules = {name: module for each in chosen for name, module in each.modules}
    weights = {f"{n}.weight": _evidence(model, n, each.config) for each in chosen for n, _ in each.modules}
    together = budget is not None or not isinstance(config.structures, Mapping)
    pools = [_pool(each, weights, budget) for each in ([chosen] if together else [[one] for one in chosen])]
    for pool in pools:
        pool.check_reachable()
    groups = {group.name: group for each in chosen for group in each.groups}
    return Targets(pools=pools, groups=groups, weights=weights, modules=modules)


def _evidence(model: PreTrainedModel, name: str, config: PruningConfig) -> WeightEvidence:
    layer = own_layer(model, name, WHAT)
    require_finite("weights", name, layer.parameter.detach())
    groups = getattr(layer.module, "groups", 1)
    return WeightEvidence(f"{name}.weight", layer.parameter, layer.kind, config, groups)


def _pool(selections: Sequence[Selection], weights: Mapping[str, WeightEvidence], budget: Budget | None) -> Pool:
    config = selections[0].config
    layers: dict[str, Layer] = {}
    for each in selections:
        layers |= limits_of(each.groups, each.config)
        mine = {name: weights[name] for name in each.layers() if name in weights}
        layers |= {name: evidence.cut.limits(each.config) for name, evidence in mine.items()}
    length = criteria.get(config.criterion).run_length
    return Pool(
        name=selections[0].name,
        kinds=kinds_of(selections),
        config=config,
        layers=layers,
        runs={name: run for name in layers if name in weights and (run := weights[name].cut.run(length)) > 1},
        budget=budget,
    )


def jobs_of(targets: Targets) -> list[tuple[PruningConfig, list[Pool]]]:
    """Return the pools by criterion and options, in the order of the rules, each with a config that has both."""
    found: list[tuple[PruningConfig, list[Pool]]] = []
    for pool in targets.pools:
        like = (pool.config.criterion, pool.config.options)
        same = next((pools for config, pools in found if (config.criterion, config.options) == like), None)
        if same is None:
            found.append((pool.config, [pool]))
        else:
            same.append(pool)
    return found
