"""Line charts over optimizer steps, as inline SVG, with a legend of the last, lowest and highest numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_compress.report.frame import BOTTOM, HEIGHT, NUM_STYLES, TOP, axes, plot_area, svg, swatch
from hf_compress.report.logs import Point
from hf_compress.report.markup import Markup, breakable, tag
from hf_compress.report.scales import Scale, limits, short

MAX_POINTS = 400
"""Of one curve; of more, the lowest and the highest of neighbours are drawn."""

MAX_DOTS = 30
"""Curves of no more points show each of them."""

Segment = tuple[float, float, float]
"""From one step to another, and how high."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve."""

    name: str

    pieces: Sequence[Sequence[Point]]
    """Of each stage that logged it; nothing joins them."""

    targets: Sequence[Segment] = ()
    """Where the curve is to be at the end of each stage."""

    @property
    def values(self) -> list[float]:
        """All that was logged."""
        return [value for piece in self.pieces for _, value in piece]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps of one stage."""

    name: str
    begin: int
    end: int


def line_chart(key: str, title: str, series: Sequence[Series], stages: Sequence[Stretch]) -> Markup:
    """Return a figure with its legend.

    Args:
        key: Unique in the page.
        title: Of the figure.
        series: At least one, each with at least one point.
        stages: Of the whole run, in their order.
    """
    heights = [value for each in series for value in each.values]
    heights += [height for each in series for *_, height in each.targets]
    x, y = plot_area((0, max(stages[-1].end, 1)), limits(heights, 0.06))
    parts = [*_boundaries(x, stages), *axes(x, y, ("optimizer step", ""))]
    for number, each in enumerate(series):
        parts += _targets(x, y, each, number)
        parts.append(_curve(x, y, each, number))
    parts.append(tag("line", class_="cursor", x1=-9, x2=-9, y1=TOP, y2=HEIGHT - BOTTOM))
    described = "; ".join(_described(each) for each in series)
    last = f" in {len(stages)} stages" if len(stages) > 1 else ""
    chart = svg(
        key, title, f"Over {stages[-1].end:,} optimizer steps{last}: {described}.", parts, class_="chart", data_lines=""
    )
    return tag(
        "figure",
        tag("figcaption", tag("h3", title)),
        chart,
        tag("p", class_="readout", aria_hidden="true"),
        _legend(title, series),
        class_="panel",
    )


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return points that draw the same curve: of each bunch of neighbours the lowest and the highest, and both ends.

    Args:
        points: Of the curve.
        most: How many to return at most; four where it is less.
    """
    most = max(most, 4)
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // (most - 2))
    found = [points[0]]
    for start in range(0, len(points), size):
        bunch = points[start : start + size]
        found += sorted({min(bunch, key=lambda p: p[1]), max(bunch, key=lambda p: p[1])})
    return list(dict.fromkeys([*found, points[-1]]))


def _curve(x: Scale, y: Scale, series: Series, number: int) -> Markup:
    pieces = [thinned(piece, MAX_POINTS // len(series.pieces)) for piece in series.pieces]
    name = f"s{number % NUM_STYLES}"
    lines = [" ".join(f"{x(step)},{y(value)}" for step, value in piece) for piece in pieces]
    parts = [tag("polyline", class_=f"line {name}", points=line) for line in lines]
    drawn = [point for piece in pieces for point in piece]
    places = [(x(step), y(value)) for step, value in drawn]
    if len(places) <= MAX_DOTS:
        parts += [tag("circle", class_=f"dot {name}", cx=a, cy=b, r=1.9) for a, b in places]
    return tag(
        "g",
        parts,
        data_name=series.name,
        data_x=" ".join(f"{step:g}" for step, _ in drawn),
        data_px=" ".join(f"{a:g}" for a, _ in places),
        data_y=" ".join(f"{value:.6g}" for _, value in drawn),
    )


def _targets(x: Scale, y: Scale, series: Series, number: int) -> list[Markup]:
    return [
        tag("line", class_=f"target s{number % NUM_STYLES}", x1=x(begin), x2=x(end), y1=y(height), y2=y(height))
        for begin, end, height in series.targets
    ]


def _boundaries(x: Scale, stages: Sequence[Stretch]) -> list[Markup]:
    """Every other stage shaded, each with its number where there is room."""
    if len(stages) < 2:
        return []
    parts = []
    for number, stage in enumerate(stages, 1):
        left, right = x(stage.begin), x(stage.end)
        width = round(right - left, 1)
        area = tag("title", f"{stage.name}: steps {stage.begin:,} to {stage.end:,}")
        style = "stage odd" if number % 2 else "stage"
        drawn = tag("rect", class_=style, x=left, y=TOP, width=width, height=HEIGHT - TOP - BOTTOM)
        parts.append(tag("g", area, drawn))
        if number > 1:
            parts.append(tag("line", class_="boundary", x1=left, x2=left, y1=TOP, y2=HEIGHT - BOTTOM))
        if width > 12:
            parts.append(
                tag(
                    "text",
                    number,
                    class_="stage-number",
                    x=round((left + right) / 2, 1),
                    y=TOP - 3,
                    text_anchor="middle",
                )
            )
    return parts


def _legend(title: str, series: Sequence[Series]) -> Markup:
    head = [tag("th", name, scope="col") for name in ("curve", "last", "lowest", "highest")]
    rows = [tag("tr", head)]
    for number, each in enumerate(series):
        cells = [tag("td", short(value)) for value in (each.values[-1], min(each.values), max(each.values))]
        rows.append(tag("tr", tag("th", swatch(number), breakable(each.name), scope="row"), cells))
        if each.targets:
            rows.append(_target_row(each, number))
    caption = tag("caption", f"{title}: last, lowest and highest number", class_="hidden")
    table = tag("table", caption, tag("thead", rows[0]), tag("tbody", rows[1:]), class_="legend")
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Numbers of {title}")


def _target_row(series: Series, number: int) -> Markup:
    heights = list(dict.fromkeys(short(height) for *_, height in series.targets))
    name = tag("th", swatch(number, target=True), "target", scope="row")
    return tag("tr", name, tag("td", ", then ".join(heights), colspan=3))


def _described(series: Series) -> str:
    values = series.values
    to = ", then ".join(dict.fromkeys(short(height) for *_, height in series.targets))
    return f"{series.name} from {short(values[0])} to {short(values[-1])}{f' (target {to})' if to else ''}"
