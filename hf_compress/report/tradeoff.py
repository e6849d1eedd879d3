"""How good models are beside how small and fast they are: a chart for each measure of cost, one numbered key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from hf_compress.report.compare import Comparison
from hf_compress.report.frame import NUM_STYLES, SHAPES, WIDTH, axes, marker, plot_area, svg
from hf_compress.report.markup import Markup, tag
from hf_compress.report.profile import ModelProfile
from hf_compress.report.scales import limits, short

SMALLER_IS_BETTER = ("perplexity", "loss", "error", "rate")
"""Words in the names of metrics."""

RADIUS = 5
GAP = 7
NEAR_X, NEAR_Y = 17, 10
"""Marks that are no farther apart, times the numbers that are there already, share the place of their numbers."""

DIGIT = 7
"""What a character of a number takes."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model of a run, with what it is compared by."""

    number: int
    """In the key; counts from 1."""

    run: str
    name: str
    profile: ModelProfile
    reference: ModelProfile
    """The dense model of the same run."""

    comparison: Comparison

    group: int
    """Models of one group share a style."""

    seed: str = ""
    """Of its run: another seed may hold other examples out, so scores compare within one only."""

    def latency(self, label: str) -> float | None:
        """Return the milliseconds of a forward pass, if they were measured."""
        return _finite(self.comparison.latency_ms.get(label, {}).get(self.name))

    def metric(self, name: str) -> float | None:
        """Return how good the model is, if that was measured."""
        return _finite(self.comparison.metrics.get(name, {}).get(self.name))


def _finite(value: float | None) -> float | None:
    """A number that a chart can show; the perplexity of a model that came apart is none."""
    return value if value is not None and isfinite(value) else None


@dataclass(frozen=True)
class Cost:
    """A measure of cost, or of what was saved."""

    title: str
    label: str
    """With its unit."""

    read: Callable[[Measured], float | None]
    better: int = -1
    """1 if more is better."""


def is_better_small(metric: str) -> bool:
    """Return whether less is better of a metric, by its name."""
    return any(word in metric.lower().split() for word in SMALLER_IS_BETTER)


def costs_of(models: Sequence[Measured]) -> list[Cost]:
    """Return all measures of cost for which at least two models have different numbers."""
    labels = dict.fromkeys(label for each in models for label in each.comparison.latency_ms)
    found = [
        Cost("Sparsity", "encoder parameters removed (%)", _sparsity, better=1),
        Cost("Parameters", "parameters", lambda each: each.profile.parameters),
        Cost("Operations", "operations of a forward pass", lambda each: each.profile.flops),
        Cost(
            "Weights on disk",
            "weights on disk (bytes)",
            lambda each: each.profile.measured_bytes or each.profile.bytes_on_disk,
        ),
        *(Cost(f"Latency, {label}", f"latency, {label} (ms)", _latency(label)) for label in labels),
    ]
    return [cost for cost in found if len({cost.read(each) for each in models} - {None}) > 1]


def tradeoff_charts(models: Sequence[Measured], metric: str, key: str) -> list[Markup]:
    """Return a figure for each measure of cost.

    Args:
        models: To show; those without the metric are left out.
        metric: Of how good they are.
        key: Unique in the page.
    """
    models = [each for each in models if each.metric(metric) is not None]
    return [_chart(f"{key}-{number}", models, metric, cost) for number, cost in enumerate(costs_of(models), 1)]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other one beats, from the least to the most of the first.

    A point beats another one if it is better in one and no worse in the other.

    Args:
        points: Pairs of which less is better of the first, more of the second.
    """
    chosen: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        last = points[chosen[-1]] if chosen else None
        if last is None or points[index][1] > last[1] or points[index] == last:
            chosen.append(index)
    return chosen


def _latency(label: str) -> Callable[[Measured], float | None]:
    return lambda each: each.latency(label)


def _sparsity(each: Measured) -> float | None:
    """Percentage of the weights that compression is about; embeddings would hide how much of them is gone."""
    own, all_of_them = each.profile.encoder_parameters, each.reference.encoder_parameters
    return None if own is None or not all_of_them else 100 * (1 - own / all_of_them)


def _chart(key: str, models: Sequence[Measured], metric: str, cost: Cost) -> Markup:
    found = [(each, cost.read(each), each.metric(metric)) for each in models]
    known = [(each, at, good) for each, at, good in found if at is not None and good is not None]
    x, y = plot_area(limits((at for _, at, _ in known), 0.1), limits((good for *_, good in known), 0.14))
    sign = -1 if is_better_small(metric) else 1
    parts, unbeaten = axes(x, y, (cost.label, metric)), set()
    seeds = list(dict.fromkeys(each.seed for each, *_ in known))
    for seed in seeds:
        own = [one for one in known if one[0].seed == seed]
        best = [own[i] for i in front([(-cost.better * at, sign * good) for _, at, good in own])]
        parts.append(tag("polyline", class_="front", points=" ".join(f"{x(at)},{y(good)}" for _, at, good in best)))
        unbeaten |= {each.number for each, *_ in best}
    for each, at, good in known:
        title = tag("title", f"{each.number}: {each.run} {each.name}, {metric} {good:.2f}, {cost.label} {short(at)}")
        style = f"mark s{each.group % NUM_STYLES}" + ("" if each.number in unbeaten else " beaten")
        parts.append(marker(SHAPES[each.group % NUM_STYLES], x(at), y(good), RADIUS, title, class_=style))
    parts += _numbers([(each.number, x(at), y(good)) for each, at, good in known])
    numbers = ", ".join(map(str, sorted(unbeaten)))
    of_seed = " of the same seed" if len(seeds) > 1 else ""
    described = f"{metric} against {cost.label} of {len(known)} models. No other model{of_seed} beats: {numbers}."
    chart = svg(key, f"{metric} and {cost.label}", described, parts, class_="chart")
    return tag("figure", tag("figcaption", tag("h3", f"{metric}: {cost.title.lower()}")), chart, class_="panel")


def _numbers(marks: Sequence[tuple[int, float, float]]) -> list[Markup]:
    """The numbers beside the marks; those of marks that nearly coincide stand in one place."""
    places: dict[tuple[float, float], list[int]] = {}
    for number, x, y in marks:
        near = (at for at, there in places.items() if abs(at[0] - x) < NEAR_X * len(there) and abs(at[1] - y) < NEAR_Y)
        places.setdefault(next(near, (x, y)), []).append(number)
    parts = []
    for (x, y), numbers in places.items():
        label = ", ".join(map(str, numbers))
        fits = x + GAP + DIGIT * len(label) <= WIDTH
        beside, anchor = (x + GAP, "start") if fits else (x - GAP, "end")
        parts.append(tag("text", label, class_="point", x=beside, y=y - GAP + 1, text_anchor=anchor))
    return parts
