"""Fill a ``LatencyTable``: whole models, shrunk to the sizes in question, are timed on the user's device.

One curve for each kind of structure is measured with everything else at its smallest, so that noise and caches have
little to hide it in; identical structures take their sizes together and share the time. A few models with everything
at the same share, and the dense one, then say what sums of parts mean for whole models. All models are timed in turns
with one and the same small model, and only ratios to its time count, so that a machine that is slower for a
while does not bend the curves.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_compress.errors import ConfigError, TargetError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import group_limits
from hf_compress.latency.key import latency_key
from hf_compress.latency.table import Curve, LatencyTable, never_falling
from hf_compress.latency.timing import median, speedup, time_models
from hf_compress.pruning.budget import Choice, choices_of
from hf_compress.shrinking.apply import plain_copy, slice_in_place
from hf_compress.shrinking.plan import plan_on

STRUCTURES = ("heads", "ffn")
"""Kinds of group whose times add up: each is a block of its own beside a residual stream."""

GRID_RATIO = 0.8
"""Neighboring widths that are measured differ by this factor."""

SHARES = (0.7, 0.5, 0.35, 0.25, 0.15, 0.08)
"""Of all units, in the whole models."""

REFERENCE_SHARE = 0.25
TOGETHER = 4
"""Models timed in turns with one run of the reference each."""

DEFAULT_ROUNDS = 7
ROUNDS_OF_TOTALS = 3
"""Times as many rounds for whole models: every prediction rests on them."""

Timer = Callable[[Mapping[str, nn.Module], Mapping[str, Any], int], Mapping[str, Sequence[float]]]
"""(models by name, inputs, rounds) -> milliseconds of each round by name; times of a round belong together."""


def time_in_turns(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Any], rounds: int
) -> Mapping[str, Sequence[float]]:
    """The timer that is meant: see ``time_models``."""
    return time_models(models, inputs, rounds=rounds)


def measure_latency(
    model: PreTrainedModel,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    structures: Sequence[str] = STRUCTURES,
    multiple_of: int = 1,
    rounds: int = DEFAULT_ROUNDS,
    graph: ModelGraph | None = None,
    timer: Timer = time_in_turns,
) -> LatencyTable:
    """Measure how long the model takes with fewer units. It is left as it was.

    Takes the time of some hundreds of forward passes; a progress bar shows how far it is.

    Args:
        model: A transformers model, on the device and in the precision that matter.
        example_inputs: Keyword arguments for ``model.forward``, of the batch size and length that matter.
        structures: Kinds of dimension group: ``heads``, ``ffn`` or both.
        multiple_of: Measure feed-forward parts at multiples of this width.
        rounds: How often each time is measured; medians count.
        graph: What is known about the model already, to save analyzing it again.
        timer: How to time models.

    Raises:
        ConfigError: If a kind of structure has no time of its own, or ``rounds`` or ``multiple_of`` is no count.
        TargetError: If the model has no such structure that can shrink.
    """
    _check(structures, multiple_of, rounds)
    inputs = make_example_inputs(model) if example_inputs is None else dict(example_inputs)
    graph = ModelGraph(model, inputs) if graph is None else graph
    classes = _classes(graph, structures, multiple_of)
    if not classes:
        raise TargetError(f"measure_latency: the model has none of {list(structures)} that can lose units.")
    bench = _Bench(Setup(model, graph, inputs, timer), _at_share(classes, REFERENCE_SHARE))
    lowest = _at_share(classes, 0.0)
    curve_points = {
        (position, level): {**lowest, **each.kept(level)}
        for position, each in enumerate(classes)
        for level in each.grid()[1:]
    }
    wholes = [lowest, *(_at_share(classes, share) for share in SHARES), {}]
    with bench.progress(len(curve_points) + len(wholes)) as bar:
        totals = bench.seconds(wholes, ROUNDS_OF_TOTALS * rounds, bar)
        on_curves = dict(zip(curve_points, bench.seconds(list(curve_points.values()), rounds, bar), strict=True))
    base = totals[0]
    curves = tuple(_curve(each, position, base, on_curves) for position, each in enumerate(classes))
    table = LatencyTable(key=latency_key(model, inputs), base=base, curves=curves, totals=())
    measured = sorted({table.sum_of_parts(kept): seconds for kept, seconds in zip(wholes, totals, strict=True)}.items())
    sums, seconds = zip(*measured, strict=True)
    return replace(table, totals=tuple(zip(sums, never_falling(seconds), strict=True)))


def _check(structures: Sequence[str], multiple_of: int, rounds: int) -> None:
    unknown = [kind for kind in structures if kind not in STRUCTURES]
    if unknown or not structures:
        raise ConfigError(
            f"measure_latency: structures={list(structures)!r}; allowed: some of {list(STRUCTURES)}. The times of "
            "others do not add up, since all matrices share them."
        )
    for name, value in {"multiple_of": multiple_of, "rounds": rounds}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"measure_latency: {name}={value!r}; allowed: an int >= 1.")


@dataclass(frozen=True)
class _Class:
    """Structures that cost the same at the same size."""

    kind: str
    choices: list[Choice]

    def kept(self, level: int) -> dict[str, int]:
        return {name: count for choice in self.choices for name, count in choice.kept(level).items()}

    def grid(self) -> list[int]:
        """Return the levels to measure, ascending: every number of heads, widths in geometric steps."""
        levels = self.choices[0].levels
        if self.kind == "heads":
            return list(range(len(levels)))
        counts = [level[0] for level in levels]
        found, width = {0, len(levels) - 1}, float(counts[-1])
        while width * GRID_RATIO >= max(counts[0], counts[-1] / 100, 1):
            width *= GRID_RATIO
            found.add(min(bisect.bisect_left(counts, width), len(levels) - 1))
        return sorted(found)

    def nearest(self, share: float) -> int:
        """Return the level that keeps about this share of the units."""
        counts = [level[0] for level in self.choices[0].levels]
        return min(range(len(counts)), key=lambda level: abs(counts[level] - share * counts[-1]))


def _classes(graph: ModelGraph, structures: Sequence[str], multiple_of: int) -> list[_Class]:
    """Sort the structures by what they cost: kind, sizes of their weights, operations."""
    groups = {g.name: g for g in graph.groups if g.kind in structures and g.frozen is None}
    choices = choices_of(group_limits(groups.values(), multiple_of=multiple_of))
    shapes = {name: tuple(p.shape) for name, p in graph.model.named_parameters()}
    found: dict[Any, list[Choice]] = {}
    for choice in choices:
        weights = [
            (groups[name].kind, part.dim, part.index.shape[1], shapes.get(part.parameter))
            for name in choice.names
            for part in groups[name].slices
        ]
        signature = (choice.levels, tuple(weights), graph.costs.flops(choice.kept(0)))
        if len(choice.levels) > 1:
            found.setdefault(signature, []).append(choice)
    return [_Class(groups[same[0].names[0]].kind, same) for same in found.values()]


def _at_share(classes: Iterable[_Class], share: float) -> dict[str, int]:
    return {name: count for each in classes for name, count in each.kept(each.nearest(share)).items()}


def _curve(each: _Class, position: int, base: float, seconds: Mapping[tuple[int, int], float]) -> Curve:
    grid, many = each.grid(), len(each.choices)
    parts = [0.0, *((seconds[position, level] - base) / many for level in grid[1:])]
    return Curve(
        members=tuple(choice.names for choice in each.choices),
        kept=tuple(each.choices[0].levels[level][0] for level in grid),
        seconds=tuple(never_falling([max(part, 0.0) for part in parts])),
    )


@dataclass(frozen=True, eq=False)
class Setup:
    """A dense model, and how it is timed, whole or with fewer units."""

    model: PreTrainedModel
    """As it will be deployed; its weights do not matter."""

    graph: ModelGraph
    """What is known about it."""

    inputs: Mapping[str, Any]
    """What is timed."""

    timer: Timer = time_in_turns
    """How."""

    def copy(self, kept: Mapping[str, int]) -> PreTrainedModel:
        """Return a copy with so many units by group name, see ``shrunk_copy``."""
        return shrunk_copy(self.model, self.graph, kept)


class _Bench:
    """Times the model at other sizes, in units of a small model that is timed with each."""

    def __init__(self, setup: Setup, reference: Mapping[str, int]) -> None:
        self.setup = setup
        self.reference = setup.copy(reference)
        self.unit: float | None = None
        """Seconds of the reference."""

    def progress(self, total: int) -> Any:
        """Return a bar, shown where transformers would show one."""
        bars: Any = logging
        return bars.tqdm(total=total, desc="Measuring latency", unit="size")

    def seconds(self, wanted: Sequence[Mapping[str, int]], rounds: int, bar: Any) -> list[float]:
        """Return the seconds of models with so many units by group name."""
        ratios: list[float] = []
        of_reference: list[float] = []
        for start in range(0, len(wanted), TOGETHER):
            part = wanted[start : start + TOGETHER]
            models = {str(i): self.setup.copy(kept) for i, kept in enumerate(part)}
            times = self.setup.timer({"reference": self.reference, **models}, self.setup.inputs, rounds)
            ratios += [speedup(times[name], times["reference"]) for name in models]
            of_reference += times["reference"]
            bar.update(len(part))
        if self.unit is None:  # of the first call, so that all have the same
            self.unit = median(of_reference) / 1000
        return [ratio * self.unit for ratio in ratios]


def shrunk_copy(model: PreTrainedModel, graph: ModelGraph, kept: Mapping[str, int]) -> PreTrainedModel:
    """Return a copy with so many units, whichever, in eval mode; weights left whole share the model's memory.

    Args:
        model: The model, which may have gates attached; the copy has none.
        graph: What is known about it.
        kept: Units that stay, by group name; other groups stay whole.
    """
    masks = {g.name: _mask(g, kept[g.name]) for g in graph.groups if kept.get(g.name, g.num_units) < g.num_units}
    duplicate = plain_copy(model, share_weights=True)
    if masks:
        slice_in_place(duplicate, plan_on(graph, masks))
    duplicate.train(False)
    return duplicate


def _mask(group: DimensionGroup, count: int) -> Tensor:
    mask = torch.zeros(group.num_units, dtype=torch.bool)
    mask[list(group.fixed_units)] = True
    rest = (~mask).nonzero().flatten()
    mask[rest[: count - len(group.fixed_units)]] = True
    return mask
