"""Tables and lists of a report that are not charts."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_compress.report.compare import Comparison
from hf_compress.report.markup import Content, Markup, tag


def comparison_table(table: Comparison) -> Markup:
    """Return the dense model beside the compressed ones: a column a model, a row a quantity."""
    header, *rows = table.rows()
    head = [
        tag("th", _hidden("quantity"), scope="col"),
        *(tag("th", name, scope="col", class_="number") for name in header[1:]),
    ]
    body = [
        tag("tr", tag("th", label, scope="row"), [tag("td", with_share(cell)) for cell in cells])
        for label, *cells in rows
    ]
    caption = tag("caption", "The dense model beside the compressed ones", class_="hidden")
    return boxed(
        "Comparison", tag("table", caption, tag("thead", tag("tr", head)), tag("tbody", body), class_="main wide")
    )


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Content]], text_columns: int = 1) -> Markup:
    """Return a table whose first column names the rows.

    Args:
        title: What it is, for its caption, which is not seen.
        header: Names of the columns.
        rows: Cells.
        text_columns: How many columns, counted from the left, hold texts; numbers are aligned to the right.
    """
    numbers = [None if position < text_columns else "number" for position in range(len(header))]
    head = [tag("th", name, scope="col", class_=style) for name, style in zip(header, numbers, strict=True)]
    body = [
        tag(
            "tr",
            tag("th", cells[0], scope="row"),
            [tag("td", cell, class_="text" if i < text_columns else None) for i, cell in enumerate(cells[1:], 1)],
        )
        for cells in rows
    ]
    caption = tag("caption", title, class_="hidden")
    return boxed(title, tag("table", caption, tag("thead", tag("tr", head)), tag("tbody", body), class_="main"))


def boxed(title: str, table: Markup) -> Markup:
    """Return a table in a box of its own, which scrolls where the page is narrow, by keyboard, too."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=title)


def code_block(title: str, code: str) -> Markup:
    """Return lines of code or YAML as they are."""
    return tag("pre", tag("code", code), tabindex="0", role="region", aria_label=title)


def pairs(facts: Mapping[str, Any]) -> Markup:
    """Return names with their values."""
    return tag("dl", [[tag("dt", name), tag("dd", str(value))] for name, value in facts.items()], class_="pairs")


def bullets(lines: Sequence[str]) -> Markup:
    """Return a list of sentences."""
    return tag("ul", [tag("li", line) for line in lines], class_="plain")


def with_share(cell: str) -> Content:
    """Return a number, with what it is of the dense model's behind it in a quieter tone."""
    value, bracket, share = cell.partition(" (")
    return [value, " ", tag("span", f"({share}", class_="share")] if bracket else value


def _hidden(name: str) -> Markup:
    return tag("span", name, class_="hidden")
