"""Masks within a budget: parameters, operations or measured time. Tensors in, tensors out.

Groups that are tied keep the same share of their units, so they choose together: a ``Choice`` is one group, or all
groups of a tie, with the numbers of units that it may keep. Within a group the units of the highest scores stay.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import ConfigError, TargetError
from hf_compress.pruning.allocate import Layer, ties

Cost = Callable[[Mapping[str, int]], int]
"""Kept units by group name -> parameters, operations or another integer. It must not fall when more is kept."""

MAX_PRICINGS = 8
"""Prices of units depend on what else is kept, so they are looked up again so often at most."""

NUM_BUCKETS = 10_000
"""Steps into which ``within_latency`` divides the time that is free to spend."""


Limits = Mapping[str, Layer]
"""By group name; a group without an entry has those of a ``Layer``."""


@dataclass(frozen=True)
class Choice:
    """Groups that choose together, and what they may choose."""

    names: tuple[str, ...]
    """The group, or the groups of a tie."""

    levels: tuple[tuple[int, ...], ...]
    """Kept units of each group, from the fewest to the most."""

    def kept(self, level: int) -> dict[str, int]:
        """Return the kept units by group name."""
        return dict(zip(self.names, self.levels[level], strict=True))


def choices_of(layers: Mapping[str, Layer]) -> list[Choice]:
    """Return what there is to choose, in the order of ``layers``.

    Args:
        layers: The size of each group, and what it must respect, by name.

    Raises:
        TargetError: If a group is tied to one that is not there.
    """
    return [Choice(names, _levels({name: layers[name] for name in names})) for names in ties(layers)]


def _levels(layers: Mapping[str, Layer]) -> tuple[tuple[int, ...], ...]:
    allowed = [set(layer.counts()) for layer in layers.values()]
    if len(allowed) == 1:
        return tuple((count,) for count in sorted(allowed[0]))
    sizes = [layer.num_units for layer in layers.values()]
    parts = math.gcd(*sizes)
    shares = [tuple(size // parts * part for size in sizes) for part in range(parts + 1)]
    return tuple(share for share in shares if all(n in can for n, can in zip(share, allowed, strict=True)))


class RankedScores:
    """Scores of groups, sorted, with the units that must stay first.

    Args:
        scores: By group name, [num_units], finite. Units of negative score are kept only where limits ask for them.
        limits: What each group must respect, by name.

    Raises:
        ConfigError: If there are no scores, or one is not finite, or they are not as many as the limits say.
        TargetError: If limits are given for other groups.
    """

    def __init__(self, scores: Mapping[str, Tensor], limits: Limits) -> None:
        if not scores:
            raise ConfigError("scores: none are given, so there is nothing to choose; pass {group name: tensor}.")
        unknown = sorted(set(limits) - set(scores))
        if unknown:
            raise TargetError(f"limits[{unknown[0]!r}]: no scores are given for this group; groups: {sorted(scores)}.")
        self.layers: dict[str, Layer] = {}
        """What each group must respect, by name."""

        self._order: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        for name, score in scores.items():
            values = score.detach().cpu().double()
            if values.dim() != 1 or not torch.isfinite(values).all():
                raise ConfigError(
                    f"scores[{name!r}]: got shape {tuple(values.shape)}, or values that are not finite; allowed: "
                    "finite numbers [num_units]."
                )
            rank = values.clone()
            layer = self.layers[name] = limits.get(name) or Layer(num_units=len(values))
            if layer.num_units != len(values):
                raise ConfigError(
                    f"limits[{name!r}]: they are those of {layer.num_units} units, but there are {len(values)} scores."
                )
            rank[list(layer.fixed_units)] = math.inf
            self._order[name] = rank.argsort(descending=True, stable=True)
            self._sums[name] = torch.cat([values.new_zeros(1), values[self._order[name]].cumsum(0)])

    def kept(self, choice: Choice) -> Tensor:
        """Return the sum of the scores that each level of a choice keeps, float64 [num_levels]."""
        counts = torch.tensor(choice.levels)
        return torch.stack([self._sums[name][counts[:, i]] for i, name in enumerate(choice.names)]).sum(0)

    def masks(self, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Return bool masks by group name, True = keep, that keep so many units."""
        found = {}
        for name, count in kept.items():
            found[name] = torch.zeros(len(self._order[name]), dtype=torch.bool)
            found[name][self._order[name][:count]] = True
        return found


def within_cost(scores: Mapping[str, Tensor], limits: Limits, cost: Cost, budget: int) -> dict[str, Tensor]:
    """Keep as much score as possible at a cost of at most ``budget``.

    Greedy by score per cost: a unit's price is what the cost changes at the present sizes; the best-priced units are
    taken as long as the exact cost allows, and prices are looked up again at the sizes that gives. Then every group
    takes what still fits.

    Where each unit has one price, whatever else is kept, the result loses at most the score of one step (of one
    group's count to the next that its limits allow) against the best possible (Dantzig 1957, "Discrete-Variable
    Extremum Problems"). Where prices depend on each other, there is no such bound.

    Args:
        scores: By group name, [num_units], higher = keep. Units of negative score are kept only where limits ask.
        limits: What each group must respect, by group name.
        cost: Kept units by group name -> cost, such as ``Costs.parameters`` or ``Costs.flops``.
        budget: The highest cost allowed.

    Returns:
        Bool masks by group name, True = keep.

    Raises:
        ConfigError: If scores are missing or not finite.
        TargetError: If the limits do not allow a cost so low; the message says which is the lowest.
    """
    ranked = RankedScores(scores, limits)
    problem = _CostProblem(ranked, choices_of(ranked.layers), cost, budget)
    lowest = problem.exact([0] * len(problem.choices))
    if lowest > budget:
        raise TargetError(
            f"budget: {budget:,} cannot be reached: with the fewest units that the limits allow, the cost is "
            f"{lowest:,}. Allow at least that, or loosen the limits."
        )
    return ranked.masks(problem.kept(problem.solve()))


class _CostProblem:
    """Levels of all choices; a step is what takes a choice from one level to the next."""

    def __init__(self, ranked: RankedScores, choices: Sequence[Choice], cost: Cost, budget: int) -> None:
        self.choices = choices
        self.cost = cost
        self.budget = budget
        self.values = [ranked.kept(choice) for choice in choices]
        self.gains = torch.cat([values.diff() for values in self.values])
        self.units = torch.cat([torch.tensor(choice.levels)[:, 0].diff().double() for choice in choices])
        steps = torch.tensor([len(choice.levels) - 1 for choice in choices])
        self.owner = torch.arange(len(choices)).repeat_interleave(steps)

    def kept(self, levels: Sequence[int]) -> dict[str, int]:
        pairs = zip(self.choices, levels, strict=True)
        return {name: count for choice, level in pairs for name, count in choice.kept(level).items()}

    def exact(self, levels: Sequence[int]) -> int:
        return self.cost(self.kept(levels))

    def score(self, levels: Sequence[int]) -> float:
        return sum(float(values[level]) for values, level in zip(self.values, levels, strict=True))

    def solve(self) -> list[int]:
        levels = [len(choice.levels) - 1 for choice in self.choices]
        best: list[int] | None = None
        for _ in range(MAX_PRICINGS):
            levels = self._taken(self._by_worth(levels))
            if best is not None and self.score(levels) <= self.score(best):
                break
            best = levels
        assert best is not None
        return best

    def _by_worth(self, levels: Sequence[int]) -> Tensor:
        """Return the steps worth taking, the one of the highest score per cost first."""
        prices = torch.tensor([self._price(levels, i) for i in range(len(levels))], dtype=torch.double)
        price = prices[self.owner] * self.units
        worth = torch.where(price > 0, self.gains / price, torch.inf)
        order = worth.argsort(descending=True, stable=True)
        return order[self.gains[order] >= 0]

    def _price(self, levels: Sequence[int], index: int) -> float:
        """Return the cost of one more unit of a choice's first group at the present sizes."""
        own = self.choices[index].levels
        low, high = max(levels[index] - 1, 0), min(levels[index] + 1, len(own) - 1)
        if low == high:
            return 0.0
        before, after = list(levels), list(levels)
        before[index], after[index] = low, high
        return (self.exact(after) - self.exact(before)) / (own[high][0] - own[low][0])

    def _taken(self, order: Tensor) -> list[int]:
        """Take steps in this order as long as they fit, then what still fits of the others."""
        owners = self.owner[order]

        def first(count: int) -> list[int]:
            return torch.bincount(owners[:count], minlength=len(self.choices)).tolist()

        fits, too_many = 0, len(order) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.exact(first(middle)) <= self.budget:
                fits = middle
            else:
                too_many = middle
        levels, full = first(fits), set()
        for owner in owners[fits:].tolist():
            if owner in full:
                continue
            levels[owner] += 1
            if self.exact(levels) > self.budget:
                levels[owner] -= 1
                full.add(owner)
                if len(full) == len(self.choices):
                    break
        return levels


@dataclass(frozen=True)
class TimedLevel:
    """One way to run a structure."""

    seconds: float
    """How long it takes."""

    loss: float
    """Importance that is lost."""


def within_latency(
    levels: Mapping[str, Sequence[TimedLevel]], budget: float, *, num_buckets: int = NUM_BUCKETS
) -> dict[str, int]:
    """Choose one level for every structure, so that the total loss is lowest and the total time within the budget.

    A dynamic program over structures and time. What each level takes beyond the structure's fastest level is rounded
    up to buckets, so rounding never exceeds the budget; the loss is at most the lowest for a budget that is smaller by
    one bucket for each structure. A bucket is the budget beyond all fastest levels, divided by ``num_buckets``.

    Source: Kurtic et al. 2023, ZipLM, arXiv:2302.04089, section 3.2; Frantar and Alistarh 2022, SPDY,
    arXiv:2201.13096, section 3.

    Args:
        levels: By structure; the order does not matter.
        budget: Seconds that all of them may take together.
        num_buckets: Resolution of time.

    Returns:
        The chosen level's position by structure.

    Raises:
        TargetError: If even the fastest levels take longer.
    """
    fastest = sum(min(level.seconds for level in each) for each in levels.values())
    if fastest > budget:
        raise TargetError(
            f"budget: {budget * 1000:.4g} ms cannot be reached: the fastest levels that the limits allow take "
            f"{fastest * 1000:.4g} ms together. Allow at least that, or loosen the limits."
        )
    bucket = (budget - fastest) / num_buckets
    best = torch.zeros(num_buckets + 1, dtype=torch.double)  # lowest loss within so many buckets
    taken: list[tuple[str, list[tuple[int, int]], Tensor]] = []
    for name, each in levels.items():
        offers = _offers(each, bucket, num_buckets)
        table = torch.full((len(offers), num_buckets + 1), torch.inf, dtype=torch.double)
        for row, (position, width) in zip(table, offers, strict=True):
            row[width:] = best[: num_buckets + 1 - width] + each[position].loss
        best, rows = table.min(dim=0)
        taken.append((name, offers, rows))
    chosen, left = {}, num_buckets
    for name, offers, rows in reversed(taken):
        position, width = offers[int(rows[left])]
        chosen[name] = position
        left -= width
    return {name: chosen[name] for name in levels}


def _offers(levels: Sequence[TimedLevel], bucket: float, num_buckets: int) -> list[tuple[int, int]]:
    """Return position and width in buckets of the levels that fit, and that no faster one beats."""
    fastest = min(level.seconds for level in levels)
    found: list[tuple[int, int]] = []
    for position in sorted(range(len(levels)), key=lambda i: (levels[i].seconds, levels[i].loss)):
        extra = levels[position].seconds - fastest
        width = 0 if extra == 0 else math.ceil(extra / bucket) if bucket > 0 else num_buckets + 1
        if width <= num_buckets and (not found or levels[position].loss < levels[found[-1][0]].loss):
            found.append((position, width))
    return found
