"""``LatencyTable``: how long a model takes, by the numbers of units it keeps; pure data."""

import dataclasses
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from hf_compress.errors import ConfigError
from hf_compress.latency.key import Key, check_key
from hf_compress.reading import are_positions, parse_json

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one kind of structure costs by its size; identical layers share one curve."""

    members: tuple[tuple[str, ...], ...]
    """The structures: names of the dimension groups that each consists of, one unless groups are tied."""

    kept: tuple[int, ...]
    """Units of a structure's first group, ascending, at which it was measured."""

    seconds: tuple[float, ...]
    """Time of one structure beyond that of the smallest size measured; it never falls."""

    def at(self, kept: int) -> float:
        """Return the seconds for a number of units, between measured ones by interpolation."""
        return interpolate(list(zip(self.kept, self.seconds, strict=True)), kept)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured latencies of one model on one device.

    The latency of a whole model is the base plus a part for each structure, from which ``totals`` leads to what whole
    models really took: parts do not simply add up where weights compete for caches.
    """

    key: Key
    """What was measured, and on what."""

    base: float
    """Seconds of the model with every structure at its smallest size, which is none where blocks can go."""

    curves: tuple[Curve, ...]
    """Parts of the structures."""

    totals: tuple[Point, ...]
    """(sum of base and parts, measured seconds) of whole models; the sums ascend, the seconds never fall."""

    def predict(self, kept: Mapping[str, int]) -> float:
        """Return the expected seconds of a forward pass.

        Args:
            kept: Units that stay, by group name; other groups stay whole.

        Raises:
            ConfigError: If a group is not in the table.
        """
        return interpolate(self.totals, self.sum_of_parts(kept))

    def sum_of_parts(self, kept: Mapping[str, int]) -> float:
        """Return base and parts added up: what ``totals`` turns into the expected seconds. See ``predict``."""
        unknown = sorted(set(kept) - {name for member in self._members() for name in member})
        if unknown:
            raise ConfigError(f"LatencyTable: group {unknown[0]!r} was not measured; measured: {self._members()}.")
        counted = ((curve, kept.get(member[0], curve.kept[-1])) for curve in self.curves for member in curve.members)
        return self.base + sum(curve.at(count) for curve, count in counted)

    def curve_of(self, names: Sequence[str]) -> tuple[str, Curve]:
        """Return the curve of a structure, and the group whose units it counts.

        Args:
            names: The groups of the structure, in any order.

        Raises:
            ConfigError: If these groups were not measured together.
        """
        for curve in self.curves:
            for member in curve.members:
                if set(member) == set(names):
                    return member[0], curve
        known = self._members()
        raise ConfigError(f"LatencyTable: {list(names)} were not measured as one structure; measured: {known}.")

    def _members(self) -> list[tuple[str, ...]]:
        return [member for curve in self.curves for member in curve.members]

    def parts_for(self, seconds: float) -> float:
        """Return the sum of parts at which ``seconds`` are expected."""
        return interpolate([(measured, parts) for parts, measured in self.totals], seconds)

    def scaled(self, factor: float) -> "LatencyTable":
        """Return a table that expects so many times as long for every model, the dense one too."""
        totals = tuple((parts, seconds * factor) for parts, seconds in self.totals)
        return dataclasses.replace(self, totals=totals)

    def check(self, key: Mapping[str, str]) -> None:
        """Check that the table holds for a device, model and inputs, see ``latency_key``.

        Raises:
            ConfigError: If not; the message says what differs.
        """
        check_key(self.key, key)

    def to_json(self) -> str:
        """Return the table as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build a table from ``to_json()`` output.

        Raises:
            ConfigError: If the text is no table.
        """
        try:
            data = parse_json(text)
            curves = tuple(_curve(each) for each in data["curves"])
            key = {name: _text(value) for name, value in data["key"].items()}
            totals = tuple((parts, seconds) for parts, seconds in data["totals"])
            _require(bool(totals) and _times([data["base"]]), "base and totals")
            _require(all(_times(side) and _never_falls(side) for side in zip(*totals, strict=True)), "totals")
            return cls(key=key, base=float(data["base"]), curves=curves, totals=totals)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"LatencyTable.from_json: not a table written by to_json(): {error!r}") from error


def _curve(data: Mapping[str, Any]) -> Curve:
    members = tuple(tuple(map(_text, member)) for member in data["members"])
    kept, seconds = tuple(data["kept"]), tuple(data["seconds"])
    _require(bool(kept) and are_positions(kept) and len(kept) == len(seconds), f"kept of {members}")
    _require(all(members) and _times(seconds) and _never_falls(seconds), f"seconds of {members}")
    return Curve(members=members, kept=kept, seconds=seconds)


def _text(value: Any) -> str:
    _require(isinstance(value, str), f"{value!r:.80} is no text")
    return str(value)


def _times(values: Sequence[Any]) -> bool:
    real = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    return real and all(math.isfinite(each) and each >= 0 for each in values)


def _never_falls(values: Sequence[float]) -> bool:
    return all(low <= high for low, high in itertools.pairwise(values))


def _require(condition: bool, where: str) -> None:
    if not condition:
        raise ValueError(f"{where}: numbers are finite and not negative, and never fall from one to the next")


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return y at x on the line through points of ascending x; beyond the ends, y grows in proportion to x."""
    position = bisect_left(points, x, key=lambda point: point[0])
    if position < len(points) and points[position][0] == x:
        return points[position][1]
    if position in (0, len(points)):
        end_x, end_y = points[0] if position == 0 else points[-1]
        return end_y * x / end_x if end_x else end_y
    (left_x, left_y), (right_x, right_y) = points[position - 1 : position + 1]
    return left_y + (right_y - left_y) * (x - left_x) / (right_x - left_x)


def never_falling(values: Sequence[float]) -> list[float]:
    """Return the numbers nearest to ``values`` (least squares) of which none is smaller than the one before.

    Source: pool adjacent violators, Ayer et al. 1955, "An Empirical Distribution Function for Sampling with Incomplete
    Information".
    """
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
