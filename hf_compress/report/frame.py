"""What all charts share: the frame with its axes, and the style of each series, which is never color alone."""

from collections.abc import Callable, Sequence

from hf_compress.report.markup import Markup, tag
from hf_compress.report.scales import Scale, short, ticks

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 24, 36
NUM_STYLES = 6
SHAPES = ("circle", "square", "diamond", "triangle", "cross", "plus")
GAP = 4
"""Between a tick and its number."""


def plot_area(x: tuple[float, float], y: tuple[float, float]) -> tuple[Scale, Scale]:
    """Return the scales of a chart.

    Args:
        x: Limits of the horizontal axis.
        y: Limits of the vertical axis.
    """
    return Scale(*x, LEFT, WIDTH - RIGHT), Scale(*y, HEIGHT - BOTTOM, TOP)


def axes(x: Scale, y: Scale, labels: tuple[str, str], show: Callable[[float], str] = short) -> list[Markup]:
    """Return grid lines, numbers and names of both axes.

    Args:
        x: Horizontal scale.
        y: Vertical scale.
        labels: Names of the horizontal and of the vertical axis.
        show: Writes the numbers of the vertical axis.
    """
    parts = []
    for value in ticks(y.low, y.high, 4):
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value)))
        parts.append(tag("text", show(value), class_="tick", x=LEFT - GAP, y=y(value) + GAP, text_anchor="end"))
    bottom = HEIGHT - BOTTOM
    for value in ticks(x.low, x.high, 5):
        parts.append(tag("line", class_="axis", x1=x(value), x2=x(value), y1=bottom, y2=bottom + GAP))
        parts.append(tag("text", short(value), class_="tick", x=x(value), y=bottom + 15, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", labels[0], class_="label", x=middle, y=HEIGHT - GAP, text_anchor="middle"))
    if labels[1]:
        parts.append(tag("text", labels[1], class_="label", x=GAP, y=TOP - 2 * GAP - 4))
    return parts


def svg(key: str, title: str, description: str, parts: Sequence[Markup], **attributes: str) -> Markup:
    """Return a chart with its name and its description for those who do not see it.

    Args:
        key: Unique in the page.
        title: What is shown.
        description: What there is to see.
        parts: Of the drawing.
        attributes: Of the element.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        parts,
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_labelledby=f"{key}-title {key}-desc",
        **attributes,
    )


def marker(shape: str, x: float, y: float, size: float, *content: Markup, class_: str) -> Markup:
    """Return the mark of a point.

    Args:
        shape: One of ``SHAPES``.
        x: Position of its middle.
        y: Position of its middle.
        size: Half its width.
        content: What it holds, such as its title.
        class_: Its style.
    """
    s, r = size, round(size * 0.85, 2)
    outlines = {
        "circle": f"M{-s},0a{s},{s} 0 1,0 {2 * s},0a{s},{s} 0 1,0 {-2 * s},0z",
        "square": f"M{-r},{-r}h{2 * r}v{2 * r}h{-2 * r}z",
        "diamond": f"M0,{-s * 1.25}L{s * 1.25},0L0,{s * 1.25}L{-s * 1.25},0z",
        "triangle": f"M0,{-s * 1.1}L{s * 1.1},{s * 0.9}L{-s * 1.1},{s * 0.9}z",
        "cross": f"M{-r},{-r}L{r},{r}M{-r},{r}L{r},{-r}",
        "plus": f"M{-s},0H{s}M0,{-s}V{s}",
    }
    drawn = tag("path", d=outlines[shape])
    return tag("g", *content, drawn, class_=class_, transform=f"translate({x} {y})")


def swatch(style: int, *, shape: str | None = None, target: bool = False) -> Markup:
    """Return a piece of a line, or a mark, for a legend.

    Args:
        style: Number of the series.
        shape: Of the mark; a line by default.
        target: Whether the line is a target's.
    """
    name = f"s{style % NUM_STYLES}"
    if shape is not None:
        drawn = marker(shape, 12, 6, 5, class_=f"mark {name}")
    else:
        drawn = tag("line", class_=f"{'target' if target else 'line'} {name}", x1=1, x2=23, y1=6, y2=6)
    return tag("svg", drawn, class_="swatch", viewBox="0 0 24 12", aria_hidden="true")
