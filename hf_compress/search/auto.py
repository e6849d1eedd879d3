"""``auto_compress``: search an allocation, train with it, shrink, and again on what is left."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.config import WIDTHS, AnnealingConfig, PruningConfig, PruningRule
from hf_compress.errors import ConfigError, TargetError, choices
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import limits_of
from hf_compress.instruments.select import select
from hf_compress.oneshot.prune import check_prunable
from hf_compress.pruning.allocate import bundles, check_reachable
from hf_compress.search.annealing import Evaluate, SearchResult, anneal, check_search, check_searchable
from hf_compress.shrinking.shrink import shrink

Train = Callable[[PreTrainedModel, PruningCallback], Trainer]
"""(model, callback) -> the Trainer that has trained this model with this callback."""

TRAINING = (
    *("options", "schedule", "power", "milestones", "rounds", "rewind_to", "initial_sparsity", "begin", "end"),
    *("update_every", "score_decay", "regrow"),
)
"""Fields of ``PruningConfig`` that say how a training goes."""


@dataclass(frozen=True, eq=False)
class AutoCompressResult:
    """The small model, and how it came about."""

    model: PreTrainedModel
    """As ``shrink`` returned it after the last iteration."""

    searches: tuple[SearchResult, ...]
    """What each iteration searched, before it trained."""

    units: dict[str, tuple[int, int]]
    """Structure -> units of the first model, and of this one."""

    def summary(self) -> str:
        """Say what is left, one line a structure, and what each search came to."""
        lines = [f"{kind}: {left:,} of {before:,} units left" for kind, (before, left) in self.units.items()]
        scores = (f"{each.score:.6g} ({each.start_score:.6g} with equal sparsities)" for each in self.searches)
        return "\n".join([*lines, f"scores of the searches: {', '.join(scores)}"])


def auto_compress(
    model: PreTrainedModel,
    evaluate: Evaluate,
    train: Train,
    structures: Mapping[str, float],
    *,
    num_iterations: int = 3,
    criterion: str = "admm",
    search_criterion: str = "l2",
    annealing: AnnealingConfig | None = None,
    exclude: Sequence[str] = (),
    min_units: int = 1,
    multiple_of: int = 1,
    example_inputs: Mapping[str, Any] | None = None,
    **training: Any,
) -> AutoCompressResult:
    """Prune in iterations: simulated annealing finds the allocation, training prunes by it, ``shrink`` removes it.

    Every iteration removes the same fraction of what is left. The next one searches in the small model.

    Args:
        model: The model; ``train`` trains it in the first iteration.
        evaluate: As in ``simulated_annealing``.
        train: Gets the model of the iteration and a ``PruningCallback``, makes a Trainer of both, trains, and returns
            it: ``trainer = Trainer(model, args, train_dataset=data, callbacks=[callback]); trainer.train()``.
        structures: Structure -> sparsity in the end, relative to the first model.
        num_iterations: How often all that is done.
        criterion: What units are scored by in training.
        search_criterion: What they are ranked by in the search, see ``simulated_annealing``.
        annealing: How to search; ``AnnealingConfig()`` by default.
        exclude: See ``PruningConfig``.
        min_units: See ``PruningConfig``.
        multiple_of: See ``PruningConfig``.
        example_inputs: Keyword arguments for one forward pass, only to analyze the model; made from its config by
            default.
        training: Further settings of ``PruningConfig`` for every training: those in ``TRAINING``, such as ``begin``,
            ``end`` and ``options``.

    Returns:
        The small model and what was searched.

    Raises:
        ConfigError: For settings that do not go together, or if ``train`` returns no Trainer.
        TargetError: If the model lacks what is asked for, or there is nothing to choose.
        ShrinkError: If ``train`` did not train to the end with the callback.

    Source: Liu et al. 2020, "AutoCompress", arXiv:1907.03141.
    """
    _check_settings(num_iterations, training)
    check_search("auto_compress", evaluate, annealing)
    if not callable(train):
        raise ConfigError(f"auto_compress: train is a {type(train).__name__}; allowed: a function that trains.")
    config = PruningConfig(
        structures=structures,
        criterion=criterion,
        exclude=tuple(exclude),
        min_units=min_units,
        multiple_of=multiple_of,
        **training,
    )
    check_searchable("auto_compress", _searched(config, search_criterion))
    check_prunable("auto_compress", model, example_inputs)
    ledger = _Ledger(config, num_iterations)
    searches: list[SearchResult] = []
    for iteration in range(1, num_iterations + 1):
        graph = ModelGraph(model, example_inputs)
        part = ledger.part(model, graph, iteration)
        if part is None:
            continue
        found = anneal(model, graph, evaluate, _searched(part, search_criterion), None, annealing)
        callback = PruningCallback(_allotted(model, graph, part, found.sparsities), example_inputs)
        trainer = _trained(train, model, callback)
        ledger.enter(graph, callback.masks())
        model = shrink(trainer, example_inputs=example_inputs, quantizers=False)
        searches.append(found)
    if not any(search.history for search in searches):
        raise TargetError(
            f"auto_compress: there was only one way to share out what stays of {', '.join(structures)}; allowed: "
            "structures whose groups compete, and sparsities above 0. Use a PruningCallback for these."
        )
    return AutoCompressResult(model, tuple(searches), ledger.units())


def _check_settings(num_iterations: Any, training: Mapping[str, Any]) -> None:
    unknown = next((name for name in training if name not in TRAINING), None)
    if unknown is not None:
        raise ConfigError(f"auto_compress: unknown setting {unknown!r} of a training; {choices(unknown, TRAINING)}.")
    if not isinstance(num_iterations, int) or isinstance(num_iterations, bool) or num_iterations < 1:
        raise ConfigError(f"auto_compress: num_iterations={num_iterations!r}; allowed: an int >= 1.")


def _trained(train: Train, model: PreTrainedModel, callback: PruningCallback) -> Trainer:
    trainer: Any = train(model, callback)
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            f"auto_compress: train returned a {type(trainer).__name__}; allowed: the Trainer that has trained the "
            "model with the callback."
        )
    if callback not in trainer.callback_handler.callbacks:
        raise ConfigError(
            "auto_compress: train returned a Trainer without the callback; allowed: one that was made with "
            "callbacks=[callback], or more callbacks beside it."
        )
    return trainer


class _Ledger:
    """Counts units from the first model on: those of groups, and those that are left of groups that are none now."""

    def __init__(self, config: PruningConfig, num_iterations: int) -> None:
        self._config = config
        self._num_iterations = num_iterations
        self._first: dict[str, int] = {}
        self._left: dict[str, int] = {}

    def part(self, model: PreTrainedModel, graph: ModelGraph, iteration: int) -> PruningConfig | None:
        """Return the config with the sparsities of an iteration; None if it has not half a unit to remove.

        Raises:
            TargetError: If all iterations together, or this one, are to remove more than may go.
        """
        if iteration == 1:
            self._open(model, graph)
        wanted = self._part(graph, iteration)
        multiple_of = self._config.multiple_of if set(WIDTHS) & set(wanted) else 1
        part = dataclasses.replace(self._config, structures=wanted, multiple_of=multiple_of)
        return part if any(wanted.values()) else None

    def _open(self, model: PreTrainedModel, graph: ModelGraph) -> None:
        sparsities = self._sparsities()
        for each in select(model, graph.groups, self._config):
            limits = limits_of(each.groups, self._config)
            check_reachable(f"structures[{each.kind!r}]", sparsities[each.kind], limits, "global")
        self._first = self._in_groups(graph)
        self._left = dict(self._first)

    def _sparsities(self) -> dict[str, float]:
        assert isinstance(self._config.structures, Mapping)
        return dict(self._config.structures)

    def _in_groups(self, graph: ModelGraph) -> dict[str, int]:
        found = dict.fromkeys(self._config.structures, 0)
        for group in graph.groups:
            if group.kind in found and not any(re.search(pattern, group.name) for pattern in self._config.exclude):
                found[group.kind] += group.num_units
        return found

    def _part(self, graph: ModelGraph, iteration: int) -> dict[str, float]:
        """Return what an iteration has to remove of the groups that are there, by structure."""
        found = {}
        for kind, here in self._in_groups(graph).items():
            share = (1 - self._sparsities()[kind]) ** (iteration / self._num_iterations)
            excess = self._left[kind] - math.floor(self._first[kind] * share + 0.5)
            if excess > here:
                raise TargetError(
                    f"auto_compress: structures[{kind!r}]: {excess} units are to go in iteration {iteration}, but only "
                    f"{here} are in groups that can lose any. Ask for less, or for fewer iterations."
                )
            if here:
                found[kind] = max(excess, 0) / here
        return found

    def enter(self, graph: ModelGraph, masks: Mapping[str, Tensor]) -> None:
        """Take in what an iteration removed."""
        kinds = {group.name: group.kind for group in graph.groups}
        for name, mask in masks.items():
            self._left[kinds[name]] -= int((~mask).sum())

    def units(self) -> dict[str, tuple[int, int]]:
        """Return the units of the first model and what is left, by structure."""
        return {kind: (count, self._left[kind]) for kind, count in self._first.items()}


def _searched(config: PruningConfig, criterion: str) -> PruningConfig:
    """Return the structures and limits of a config alone, with a criterion of the search."""
    return PruningConfig(
        structures=config.structures,
        criterion=criterion,
        exclude=config.exclude,
        min_units=config.min_units,
        multiple_of=config.multiple_of,
    )


def _allotted(
    model: PreTrainedModel, graph: ModelGraph, config: PruningConfig, sparsities: Mapping[str, float]
) -> PruningConfig:
    """Return the config with a rule for every group; what no rule takes, the last one of each structure, is its own."""
    own: dict[str, float] = {}
    rules: list[PruningRule] = []
    for each in select(model, graph.groups, config):
        *others, last = bundles(limits_of(each.groups, config))
        own[each.kind] = sparsities[last.names[0]]
        for bundle in others:
            pattern = f"^({'|'.join(map(re.escape, bundle.names))})$"
            rules.append(PruningRule(match=(pattern,), structures={each.kind: sparsities[bundle.names[0]]}))
    return dataclasses.replace(config, structures=own, rules=tuple(rules))
