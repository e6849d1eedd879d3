"""What every layer kept, stage by stage: a table of numbers with a shade behind each."""

import re
from collections.abc import Iterable, Mapping, Sequence

from hf_compress.report.markup import Markup, tag
from hf_compress.report.plots import TITLES, KeptUnits

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

Kept = Mapping[str, Mapping[str, Sequence[KeptUnits]]]
"""Name of a model -> kind of dimension group -> what is left of each group, in the model's order."""


def heat_maps(kept: Kept) -> list[Markup]:
    """Return a table for each kind of group and each stack of layers: a row a model, a column a layer.

    Args:
        kept: Of the models in their order, those of which nothing is known left out.
    """
    blocks = dict.fromkeys((kind, stack) for kinds in kept.values() for kind in kinds for stack in _stacks(kinds[kind]))
    return [_table(kind, stack, kept) for kind, stack in blocks]


def _stacks(units: Iterable[KeptUnits]) -> dict[str, list[KeptUnits]]:
    """Groups whose names differ in the number of their layer alone belong to one stack."""
    found: dict[str, list[KeptUnits]] = {}
    for unit in units:
        found.setdefault(LAYER_NUMBER.sub("*", unit.name, count=1), []).append(unit)
    return found


def _table(kind: str, stack: str, kept: Kept) -> Markup:
    rows = {name: _stacks(kinds[kind]).get(stack, []) for name, kinds in kept.items() if kind in kinds}
    rows = {name: units for name, units in rows.items() if units}
    layers = list(dict.fromkeys(unit.name for units in rows.values() for unit in units))
    totals = {unit.name: unit.total for units in rows.values() for unit in units}
    head = [tag("th", _layer(name, position), scope="col", title=name) for position, name in enumerate(layers)]
    dense = [KeptUnits(name=name, kept=totals[name], total=totals[name]) for name in layers]
    body = [_row("dense", dense, layers), *(_row(name, units, layers) for name, units in rows.items())]
    title = f"{TITLES.get(kind, kind).capitalize()} kept by layer"
    table = tag(
        "table",
        tag("caption", tag("h3", title), tag("code", stack)),
        tag("thead", tag("tr", tag("th", "model", scope="col"), head, tag("th", "all", scope="col"))),
        tag("tbody", body),
        class_="heat",
    )
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"{title}: {stack}")


def _row(name: str, units: Sequence[KeptUnits], layers: Sequence[str]) -> Markup:
    found = {unit.name: unit for unit in units}
    cells = [_cell(found.get(layer)) for layer in layers]
    kept, total = sum(unit.kept for unit in units), sum(unit.total for unit in units)
    share = f" ({kept / total:.0%})" if total else ""
    return tag("tr", tag("th", name, scope="row"), cells, tag("td", f"{kept:,} of {total:,}{share}", class_="sum"))


def _cell(unit: KeptUnits | None) -> Markup:
    if unit is None:
        return tag("td", "-")
    share = unit.kept / unit.total if unit.total else 0.0
    title = f"{unit.name}: {unit.kept:,} of {unit.total:,} kept ({share:.0%})"
    return tag("td", f"{unit.kept:,}", title=title, style=f"--share:{100 * share:.0f}%")


def _layer(name: str, position: int) -> str:
    number = LAYER_NUMBER.search(name)
    return number.group() if number else str(position)
