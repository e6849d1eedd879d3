"""Axes of charts: round ticks, positions, short numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """Maps numbers to positions."""

    low: float
    high: float
    start: float
    """Position of ``low``."""

    end: float
    """Position of ``high``."""

    def __call__(self, value: float) -> float:
        """Return the position of a number, rounded to what an eye can see."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def limits(values: Iterable[float], margin: float = 0.0) -> tuple[float, float]:
    """Return the least and the largest number, apart by at least something.

    Args:
        values: At least one.
        margin: Share of the distance to add on both sides.
    """
    known = list(values)
    low, high = min(known), max(known)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(high) / 20 or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Return round numbers between two others: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: The lower end.
        high: The upper end.
        number: How many there are at most, about.
    """
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(position * step, 12) for position in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number in four digits at most: ``0.25``, ``1.2 k``, ``16.25 M``."""
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g}"
