"""HTML and SVG as values: a text becomes markup only by being escaped."""

from collections.abc import Iterable
from html import escape
from unicodedata import category

VOID = frozenset({"meta", "wbr", "line", "rect", "circle", "path", "polyline"})
"""Elements without contents that are written here; those of SVG are closed with a slash, which HTML allows."""

UNWRITABLE = ("Cc", "Cs")


class Markup(str):
    """Text that is markup already; every other ``str`` is escaped where it is put into markup."""

    __slots__ = ()


Content = str | int | Iterable["Content"] | None
"""Markup, text to escape, a number, nothing, or several of these."""


def text(content: Content) -> Markup:
    """Return contents as markup, with what is no markup escaped."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int):
        return Markup(escape(_printable(str(content))))
    return Markup("".join(text(each) for each in content))


def tag(name: str, /, *content: Content, **attributes: str | int | float | None) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        content: What it holds.
        attributes: By name: ``class_`` stands for ``class`` and ``aria_label`` for ``aria-label``. Those that are None
            are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{text(content)}</{name}>")


def breakable(name: str) -> Markup:
    """Return a name that may go on in the next line after each of its underscores."""
    return Markup(tag("wbr").join(text(f"{part}_") for part in name.split("_"))[:-1])


def _printable(given: str) -> str:
    """Without control characters, which HTML does not allow, and halves of characters, which no encoding writes."""
    return "".join(c if c in "\n\t" or category(c) not in UNWRITABLE else "\N{REPLACEMENT CHARACTER}" for c in given)
