"""Pruning of one model, step by step: reads evidence, lets methods score, moves masks. Knows no Trainer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import PruningConfig
from hf_compress.errors import TrainingError
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.finished import make_gates_final
from hf_compress.instruments.gate import check_gateable
from hf_compress.instruments.limits import limits_of
from hf_compress.instruments.select import Selection, kinds_of, select
from hf_compress.instruments.sharded import first_not_finite
from hf_compress.instruments.units import GroupUnits
from hf_compress.instruments.weight_units import WeightUnits
from hf_compress.pruning.allocate import Layer
from hf_compress.pruning.method import DeferringMethod, Method, Reading, Setting
from hf_compress.pruning.pools import Pool, ScheduledPool
from hf_compress.pruning.timetable import Timetable
from hf_compress.pruning.whole_model import Budget
from hf_compress.registry import criteria

Mean = Callable[[Mapping[str, Tensor | None], Mapping[str, Tensor]], Mapping[str, Tensor | None]]
"""(tensors by name, zeros of the same shapes) -> their means over all ranks; None where no rank has one."""

MISSING: dict[Reading, str] = {
    "gate_gradients": "the gates of {name!r} got no gradient",
    "activations": "no token reached the consumers of {name!r}",
    "changes": "no token passed the layers of {name!r}",
}


class Pruner:
    """The pools of a config at work on a model.

    Args:
        model: The model; gates and masks are put on its modules.
        graph: What is known about it.
        config: What to prune.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Says how many of them an epoch has.
        seed: Of what is random.
        budget: Of the whole model, if the config has one.

    Raises:
        TargetError: If the model cannot be pruned as the config says.
        ConfigError: If the schedule does not fit into the run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        graph: ModelGraph,
        config: PruningConfig,
        total_steps: int,
        steps_per_epoch: Callable[[], int] | None = None,
        seed: int = 0,
        budget: Budget | None = None,
    ) -> None:
        self.model = model
        self.units: dict[str, GroupUnits | WeightUnits] = {}
        self.masks: dict[str, Tensor] = {}
        self.thresholds: dict[str, float] = {}
        self.pools: list[ScheduledPool] = []
        chosen = select(model, graph.groups, config)
        check_gateable(model, [group for each in chosen for group in each.groups])
        together = [chosen] if budget is not None else [[each] for each in chosen]
        try:
            for selections in together:
                self._add(selections, lambda part: part.moments(total_steps, steps_per_epoch), seed, budget)
            units = self.units.items()
            self.unread = {name for name, each in units if each.blank()}
            """Layers of which nothing was read so far."""

            self._skipped: set[str] = set()
            self._blank = {_key((name, key)): zeros for name, each in units for key, zeros in each.blank().items()}
        except BaseException:
            self.remove()
            raise

    def _add(
        self,
        selections: Sequence[Selection],
        moments: Callable[[PruningConfig], list[tuple[int, float]]],
        seed: int,
        budget: Budget | None,
    ) -> None:
        """Make a pool."""
        config = selections[0].config
        name, kind = selections[0].name, selections[0].kind
        sparsity = config.structures[kind] if isinstance(config.structures, Mapping) else None
        setting = Setting(score_decay=config.score_decay, seed=seed, sparsity=sparsity)
        method: Method = criteria.get(config.criterion)(config.method_options(), setting)
        layers = {name: limits for each in selections for name, limits in self._cover(each, method).items()}
        part = Pool(
            name=name if budget is None else "budget",
            kinds=kinds_of(selections),
            config=config,
            layers=layers,
            runs={each: run for each in layers if (run := self._run(each, method)) > 1},
            budget=budget,
        )
        part.check_reachable()
        pool = ScheduledPool(**vars(part), method=method, timetable=Timetable.of(config, moments(config), sparsity))
        self.pools.append(pool)
        for layer in layers:
            self.masks[layer] = torch.ones(self.units[layer].num_units, dtype=torch.bool)
            method.start(layer, self.units[layer].evidence)
            self.show(pool, layer)

    def _cover(self, selection: Selection, method: Method) -> dict[str, Layer]:
        """Make units of what a selection covers; return what an allocation must respect of them."""
        config = selection.config
        layers = limits_of(selection.groups, config)
        for group in selection.groups:
            self.units[group.name] = GroupUnits(group, self.model, method)
        for name, module in selection.modules:
            weight = WeightUnits(name, module, config, method)
            self.units[weight.name] = weight
            layers[weight.name] = weight.evidence.cut.limits(config)
        return layers

    def _run(self, name: str, method: Method) -> int:
        """Return how many neighbouring units of a layer compete with each other only."""
        units = self.units[name]
        return units.evidence.cut.run(method.run_length) if isinstance(units, WeightUnits) else 1

    def read(self, step: int, mean: Mean, loss_scale: float) -> None:
        """Take in the gradients and activations of an optimizer step, before the optimizer acts.

        Args:
            step: Optimizer steps done before it.
            mean: Averages over ranks; called once, by every rank.
            loss_scale: What gates' gradients are multiplied with.

        Raises:
            TrainingError: If there is nothing to read.
        """
        taken = {(name, key): each for name, units in self.units.items() for key, each in units.take().items()}
        if taken:
            mine = {_key(each): value for each, value in taken.items()}
            means = mean(mine, self._blank)
            self._give(step, {each: means[_key(each)] for each in taken}, loss_scale)
        for pool in self.pools:
            self.set_time(pool, step + 1)
            for name in pool.layers:
                if name not in self._skipped:
                    pool.method.step(name, self.units[name].evidence)
            pool.method.end_step()
            if isinstance(pool.method, DeferringMethod):
                self._pull(pool.method, pool.layers)

    def _pull(self, method: DeferringMethod, names: Iterable[str]) -> None:
        for name in names:
            change = method.pull(name, self.units[name].evidence)
            if change is not None:
                self.units[name].evidence.add_to_gradients(change)

    def set_time(self, pool: ScheduledPool, step: int) -> None:
        """Tell a method how far its schedule is in an optimizer step, the first being 1."""
        pool.method.share, pool.method.over = pool.timetable.share(step), step > pool.timetable.end

    def _give(self, step: int, means: Mapping[tuple[str, Reading], Tensor | None], loss_scale: float) -> None:
        """Hand evidence out; a layer that no rank ran in this step (LayerDrop) is left out of it."""
        given: dict[str, dict[Reading, Tensor]] = {}
        self._skipped = {name for (name, _), tensor in means.items() if tensor is None}
        for (name, key), tensor in means.items():
            if tensor is not None:
                scaled = key == "gate_gradients" and loss_scale != 1
                given.setdefault(name, {})[key] = tensor / loss_scale if scaled else tensor
                self.unread.discard(name)
        for name, readings in given.items():
            self.units[name].evidence.give(readings)
        for pool in self.pools:
            if all(name in self._skipped for name in pool.layers):
                raise _nothing_read(pool, next(iter(pool.layers)), f"in step {step + 1}")

    def update(self, step: int) -> bool:
        """Move masks and factors after an optimizer step; return whether masks were due.

        Raises:
            TrainingError: If scores do not say what goes, a layer's evidence never came, or weights are no numbers.
        """
        due = False
        for pool in self.pools:
            if pool.timetable.is_due(step):
                due = True
                if step == pool.timetable.end:
                    self._check_weights()
                silent = next((name for name in pool.layers if name in self.unread), None)
                if silent is not None:
                    raise _nothing_read(pool, silent, "so far")
                now = {name: self.masks[name] for name in pool.layers}
                evidence = {name: self.units[name].evidence for name in pool.layers}
                masks, threshold = pool.masks(step, evidence, now)
                for name, mask in masks.items():
                    self.masks[name] = mask
                    self.units[name].set_mask(mask)
                if threshold is not None:
                    self.thresholds[pool.name] = threshold
            self.set_time(pool, step + 1)
            for name in pool.layers:
                self.show(pool, name)
        return due

    def _check_weights(self) -> None:
        """Not every criterion would notice: chance and counts of activations say something of any weights."""
        name = first_not_finite(self.model)
        if name is not None:
            raise TrainingError(
                f"PruningCallback: {name!r} is NaN or infinite in places at the end of the schedule. Check the loss "
                "and its precision, and the weights that training began with."
            )

    def show(self, pool: ScheduledPool, name: str) -> None:
        """Put the factors of a method that has some on the units of a layer."""
        factors = _factors(pool.method, name)
        if factors is not None:
            kept = self.masks[name].to(factors[0].device)
            self.units[name].set_values(factors[0] * kept, factors[1] * kept)

    def each(self) -> Iterator[tuple[ScheduledPool, str]]:
        """Yield all layers' names, each with its pool."""
        return ((pool, name) for pool in self.pools for name in pool.layers)

    def group_masks(self) -> dict[str, Tensor]:
        """Return the masks of dimension groups alone, by name."""
        return {name: mask for name, mask in self.masks.items() if isinstance(self.units[name], GroupUnits)}

    def fold(self) -> list[str]:
        """Write the final masks and factors into the weights, and take off what is not needed any more.

        Returns:
            Groups whose gates stay on, because weights alone cannot say what is gone.
        """
        staying = []
        for pool, name in self.each():
            factors = _factors(pool.method, name)
            done = self.units[name].fold(self.masks[name], None if factors is None else factors[1])
            if done:
                self.units[name].remove()
            else:
                self.units[name].stop_reading()
                staying.append(name)
        make_gates_final(self.model)
        return staying

    def remove(self) -> None:
        """Take everything off the model."""
        for units in self.units.values():
            units.remove()


def _nothing_read(pool: ScheduledPool, name: str, when: str) -> TrainingError:
    key = next(key for key in MISSING if key in pool.method.reads)
    return TrainingError(
        f"PruningCallback: {MISSING[key].format(name=name)} {when}, so criterion {pool.config.criterion!r} has nothing "
        "to go by. Is that part of the model frozen or skipped in training?"
    )


def _factors(method: Method, name: str) -> tuple[Tensor, Tensor] | None:
    return method.factors(name) if isinstance(method, DeferringMethod) else None


def _key(name_and_reading: tuple[str, Any]) -> str:
    return "|".join(name_and_reading)
