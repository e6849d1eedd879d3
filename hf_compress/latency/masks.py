"""From scores and a time to masks, and to a model that was measured to be so fast."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ConfigError, TargetError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import group_limits
from hf_compress.latency.cache import latency_table
from hf_compress.latency.key import latency_key
from hf_compress.latency.measure import Setup, Timer, time_in_turns
from hf_compress.latency.table import LatencyTable
from hf_compress.latency.timing import DEFAULT_ROUNDS, median, speedup
from hf_compress.pruning.budget import Choice, Limits, RankedScores, TimedLevel, choices_of, within_latency
from hf_compress.shrinking.shrink import shrink

MAX_LEVELS = 256
"""Levels of one structure among which to choose; of more units, evenly spaced ones."""

MAX_CORRECTIONS = 4
TOLERANCE = 0.1
"""How far the measured speed-up may lie from the one that was asked for."""

CLOSE_ENOUGH = 0.03
"""No further correction within this."""

Scores = Mapping[str, Tensor]
Masks = dict[str, Tensor]


def masks_within_latency(
    table: LatencyTable, scores: Scores, limits: Limits, seconds: float, final: float = math.inf
) -> Masks:
    """Keep as much score as possible in a model that is expected to take at most so long.

    Args:
        table: Measured latencies.
        scores: By group name, [num_units], higher = keep; comparable between groups. Groups without scores stay whole.
        limits: What each group must respect, such as ``group_limits(groups)``.
        seconds: Time of one forward pass.
        final: Less time, if that is to be asked for later: it has to be in reach, too.

    Returns:
        Bool masks by group name, True = keep.

    Raises:
        ConfigError: If scores are missing or not finite, or a group was not measured.
        TargetError: If the limits do not allow a time so short; the message says which is the shortest.
    """
    ranked = RankedScores(scores, limits)
    choices = {choice.names[0]: choice for choice in choices_of(ranked.layers)}
    lowest = {name: count for choice in choices.values() for name, count in choice.kept(0).items()}
    dense, fastest = table.predict({}), table.predict(lowest)
    least = min(seconds, final)
    if fastest > least:
        raise TargetError(
            f"latency: {least * 1000:.4g} ms ({dense / least:.2f} times as fast as whole) cannot be reached with "
            f"these structures and limits: with the fewest units, the model takes {fastest * 1000:.4g} ms "
            f"({dense / fastest:.2f} times). Ask for less, prune more structures, or loosen the limits."
        )
    positions = {name: _thinned(choice) for name, choice in choices.items()}
    timed = {name: _timed(table, choice, positions[name], ranked) for name, choice in choices.items()}
    chosen = within_latency(timed, max(table.parts_for(seconds) - table.sum_of_parts(lowest), 0.0))
    kept: dict[str, int] = {}
    for name, choice in choices.items():
        kept |= choice.kept(positions[name][chosen[name]])
    return ranked.masks(kept)


def _thinned(choice: Choice) -> Sequence[int]:
    count = len(choice.levels)
    if count <= MAX_LEVELS:
        return range(count)
    return [round(i * (count - 1) / (MAX_LEVELS - 1)) for i in range(MAX_LEVELS)]


def _timed(table: LatencyTable, choice: Choice, positions: Sequence[int], ranked: RankedScores) -> list[TimedLevel]:
    """Return time beyond the lowest level, and lost score, of the levels at these positions."""
    first, curve = table.curve_of(choice.names)
    counts = [level[choice.names.index(first)] for level in choice.levels]
    gains = ranked.kept(choice)
    best, start = float(gains.max()), curve.at(counts[0])
    return [TimedLevel(curve.at(counts[i]) - start, best - float(gains[i])) for i in positions]


@dataclass(frozen=True, kw_only=True)
class Tries:
    """Masks that were measured, one after the other."""

    tried: tuple[tuple[float, float], ...]
    """(expected, measured) speed-up of each."""

    closest: Masks
    """Those whose measured speed-up came closest to the one asked for."""

    table: LatencyTable
    """As it was corrected."""


def tried_masks(
    table: LatencyTable,
    dense: float,
    target: float,
    choose: Callable[[LatencyTable], Masks],
    measure: Callable[[dict[str, int]], float],
) -> Tries:
    """Choose masks, measure them, correct the table by what was found, and so on, a few times at most.

    The n-th correction goes 1/n of the way (Robbins and Monro 1951, doi:10.1214/aoms/1177729586): the table is off by
    the geometric mean of all that was measured, so that a single disturbed measurement counts less and less. A
    corrected table may say that the target is out of reach; what was tried counts then.

    Args:
        table: Measured latencies.
        dense: Seconds of the dense model, as measured before any correction.
        target: The speed-up that is asked for.
        choose: Table -> masks by group name.
        measure: Kept units by group name -> measured speed-up.

    Raises:
        TargetError: If ``choose`` raises it for the table as it was given.
    """
    tried: list[tuple[float, float]] = []
    found: list[tuple[float, int, Masks]] = []
    for number in range(1, MAX_CORRECTIONS + 1):
        try:
            masks = choose(table)
        except TargetError:
            if not tried:
                raise
            break
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        tried.append((dense / table.predict(kept), measure(kept)))
        expected, measured = tried[-1]
        found.append((abs(measured / target - 1), number, masks))
        if found[-1][0] <= CLOSE_ENOUGH:
            break
        table = table.scaled((expected / measured) ** (1 / number))
    return Tries(tried=tuple(tried), closest=min(found)[2], table=table)


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeedup:
    """Two models, timed in turns."""

    ratio: float
    """How many times as fast the second one is: the median over rounds of first time / second time."""

    seconds: tuple[float, float]
    """Median of each, in seconds."""


def measure_speedup(
    dense: nn.Module,
    small: nn.Module,
    inputs: Mapping[str, Any],
    *,
    rounds: int = DEFAULT_ROUNDS,
    timer: Timer = time_in_turns,
) -> MeasuredSpeedup:
    """Measure how many times as fast one model is as another, in turns, so that a noisy machine is noisy for both.

    Args:
        dense: The slower one.
        small: The faster one.
        inputs: Keyword arguments for each ``forward``.
        rounds: How often both are timed.
        timer: How to time models.

    Raises:
        GraphError: If a model does not run on the inputs.
    """
    times = timer({"dense": dense, "small": small}, inputs, rounds)
    both = (median(times["dense"]) / 1000, median(times["small"]) / 1000)
    return MeasuredSpeedup(ratio=speedup(times["dense"], times["small"]), seconds=both)


def speedup_of(setup: Setup, small: nn.Module, rounds: int = DEFAULT_ROUNDS) -> MeasuredSpeedup:
    """Measure how many times as fast a model is as the whole one.

    Args:
        setup: Has the whole one.
        small: The faster one.
        rounds: How often both are timed.

    Raises:
        GraphError: If a model does not run on the inputs.
    """
    return measure_speedup(setup.copy({}), small, setup.inputs, rounds=rounds, timer=setup.timer)


def latency_masks(
    model: PreTrainedModel,
    scores: Scores,
    *,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    table: LatencyTable | None = None,
) -> Masks:
    """Return the masks that keep most score in a model that is expected to be so fast; ``shrink`` realizes them.

    Args:
        model: The dense model.
        scores: By group name, [num_units], higher = keep; comparable between groups. Groups without scores stay whole.
        target_speedup: Latency of the dense model / latency of the small one, above 1.
        target_latency_ms: Latency of the small model in milliseconds, instead of ``target_speedup``.
        example_inputs: Keyword arguments for ``model.forward``, of the batch size and length that matter; made from
            the config by default.
        limits: What each group must respect; by default what the groups say themselves, see ``group_limits``.
        table: Measured latencies; by default ``latency_table`` finds them on disk or measures.

    Raises:
        ConfigError: If not exactly one target is given, it is out of range, or the table is of something else.
        TargetError: If the target cannot be reached, or scores name groups that cannot lose units.
    """
    problem = _Problem(model, scores, example_inputs, limits, table)
    return problem.masks(problem.table, problem.seconds(target_speedup, target_latency_ms))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A small model and what was found on the way to it."""

    model: PreTrainedModel
    """Shrunk and verified."""

    masks: Masks
    """By group name, True = keep."""

    measured: MeasuredSpeedup
    """Of the model, after it was chosen."""

    tried: tuple[tuple[float, float], ...]
    """(expected, measured) speed-up of every set of masks that was tried, in order."""


def fit_speedup(
    model: PreTrainedModel,
    scores: Scores,
    target_speedup: float,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    table: LatencyTable | None = None,
    rounds: int = DEFAULT_ROUNDS,
    timer: Timer = time_in_turns,
) -> Fit:
    """Shrink a model until it is measured to be so many times as fast, to within 10 %.

    Masks from the table are cut out of a copy and measured beside the dense model, and the table is corrected, see
    ``tried_masks``. The masks whose speed-up came closest are shrunk, verified and measured again.

    Args:
        model: See ``latency_masks``.
        scores: See ``latency_masks``.
        target_speedup: See ``latency_masks``.
        example_inputs: See ``latency_masks``.
        limits: See ``latency_masks``.
        table: See ``latency_masks``.
        rounds: How often each speed-up is measured; medians count.
        timer: How to time models.

    Raises:
        ConfigError: See ``latency_masks``.
        TargetError: If the target cannot be reached, or was missed by more than 10 %, in either direction: a model that
            is too fast has lost more than it had to.
        ShrinkError: See ``shrink``.
    """
    problem = _Problem(model, scores, example_inputs, limits, table, timer)
    seconds = problem.seconds(target_speedup, None)
    tries = tried_masks(
        problem.table,
        problem.table.predict({}),
        target_speedup,
        lambda table: problem.masks(table, seconds),
        lambda kept: speedup_of(problem.setup, problem.setup.copy(kept), rounds).ratio,
    )
    small = shrink(model, tries.closest, example_inputs=problem.setup.inputs, quantizers=False)
    measured = speedup_of(problem.setup, small, rounds)
    if abs(measured.ratio / target_speedup - 1) > TOLERANCE:
        told = ", ".join(f"{ratio:.2f}" for _, ratio in tries.tried)
        raise TargetError(
            f"fit_speedup: asked for {target_speedup:g} times as fast, measured {measured.ratio:.2f} (allowed: within "
            f"{TOLERANCE:.0%}); measured on the way: {told}. If these scatter, other work disturbs the machine: stop "
            "it, or raise rounds. If not, the units are too coarse for this target."
        )
    return Fit(model=small, masks=tries.closest, measured=measured, tried=tries.tried)


class _Problem:
    """A model, what is known about it, and what is asked."""

    def __init__(
        self,
        model: PreTrainedModel,
        scores: Scores,
        example_inputs: Mapping[str, Any] | None,
        limits: Limits | None,
        table: LatencyTable | None,
        timer: Timer = time_in_turns,
    ) -> None:
        self.scores = scores
        inputs = make_example_inputs(model) if example_inputs is None else dict(example_inputs)
        graph = ModelGraph(model, inputs)
        self.setup = Setup(model, graph, inputs, timer)
        groups = {group.name: group for group in graph.groups}
        for name in scores:
            if name not in groups or groups[name].frozen is not None:
                why = f"it cannot lose units: {groups[name].frozen}" if name in groups else "there is no such group"
                raise TargetError(f"scores[{name!r}]: {why}. dimension_groups(model) lists the groups.")
        self.limits = group_limits([groups[name] for name in scores]) if limits is None else limits
        if table is None:
            table = latency_table(model, inputs, graph=graph, timer=timer)
        table.check(latency_key(model, inputs))
        self.table = table

    def seconds(self, target_speedup: float | None, target_latency_ms: float | None) -> float:
        given = [value for value in (target_speedup, target_latency_ms) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise ConfigError(
                f"latency: target_speedup={target_speedup!r}, target_latency_ms={target_latency_ms!r}; allowed: "
                "exactly one of them, a number above 0."
            )
        dense = self.table.predict({})
        seconds = dense / target_speedup if target_speedup is not None else given[0] / 1000
        if seconds >= dense:
            raise ConfigError(
                f"latency: {seconds * 1000:.4g} ms is no less than the {dense * 1000:.4g} ms of the dense model, so "
                "nothing would be removed. Ask for less time."
            )
        return seconds

    def masks(self, table: LatencyTable, seconds: float) -> Masks:
        return masks_within_latency(table, self.scores, self.limits, seconds)
