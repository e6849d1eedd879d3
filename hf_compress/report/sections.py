"""The sections of the page about one run or model."""

from dataclasses import dataclass
from typing import Any

from hf_compress.config import Recipe
from hf_compress.report.curves import training_charts
from hf_compress.report.folders import RECIPE_FILE, RunFolder
from hf_compress.report.frame import NUM_STYLES, SHAPES, swatch
from hf_compress.report.heatmap import heat_maps
from hf_compress.report.markup import Content, Markup, tag
from hf_compress.report.tables import bullets, code_block, comparison_table, pairs
from hf_compress.report.tradeoff import Measured, tradeoff_charts
from hf_compress.report.wording import costs_measured_on, loading_code, measured_on, needs

SEEDS = ("seed", "data_seed")
HINT = (
    "Filled marks, joined by a dashed line, are beaten by no other model: none is better in one respect and no worse "
    "in the other. Hollow ones are beaten."
)
"""How to read the charts of quality and cost."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading."""

    key: str
    """Unique in the page."""

    title: str
    body: Content


def run_sections(run: RunFolder) -> list[Section]:
    """Return all sections; of what is not there, one says so."""
    return [
        Section(key="comparison", title="Comparison", body=_comparison(run)),
        Section(key="tradeoff", title="Quality and cost", body=_tradeoff(run)),
        Section(key="kept", title="What every layer kept", body=_kept(run)),
        Section(key="training", title="Training", body=_training(run)),
        Section(key="load", title="Load it", body=_load(run)),
        Section(key="recipe", title="Recipe", body=_recipe(run)),
        Section(key="environment", title="Environment and seeds", body=_environment(run)),
        Section(key="notes", title="Notes", body=_notes(run)),
    ]


def absent(sentence: str) -> Markup:
    """Return a sentence about something that is not there."""
    return tag("p", sentence, class_="note")


def measured(run: RunFolder, first: int = 1, group: int | None = None) -> list[Measured]:
    """Return the models of a finished run, numbered.

    Args:
        run: The run.
        first: Number of the first model.
        group: Style of all models; by default that of the dense model differs from the others'.
    """
    if run.comparison is None:
        return []
    table = run.comparison
    dense, *_ = table.profiles
    return [
        Measured(
            number=number,
            run=run.path.name if group is not None else "",
            name=name,
            profile=profile,
            reference=table.profiles[dense],
            comparison=table,
            group=group if group is not None else int(name != dense),
            seed="" if run.recipe is None else seeds_of(run.recipe).get("seed", ""),
        )
        for number, (name, profile) in enumerate(table.profiles.items(), first)
    ]


def tradeoff_panels(models: list[Measured], hint: str, key: Content = None) -> Content:
    """Return the charts of every metric against every measure of cost, or say why there are none.

    Those of the first metric are open.

    Args:
        models: To show.
        hint: How to read the charts.
        key: What the numbers in them stand for.
    """
    metrics = dict.fromkeys(metric for each in models for metric in each.comparison.metrics)
    found = {metric: tradeoff_charts(models, metric, f"tradeoff-{number}") for number, metric in enumerate(metrics, 1)}
    panels = [(metric, tag("div", charts, class_="panels")) for metric, charts in found.items() if charts]
    if not panels:
        return absent("There is no chart: there are no two models that differ in cost and have a metric.")
    (_, first), *others = panels
    folded = [tag("details", tag("summary", f"The same for {metric}"), charts) for metric, charts in others]
    return [tag("p", hint, class_="hint"), key, first, folded]


def mark_of(each: Measured) -> Markup:
    """Return the mark that stands for a model in the charts."""
    return swatch(each.group, shape=SHAPES[each.group % NUM_STYLES])


def _comparison(run: RunFolder) -> Content:
    if run.comparison is None:
        return absent("There is no comparison: the run is not finished.")
    own = next(iter(run.results.values()), None)
    sentence = costs_measured_on(run.comparison) if own is None else measured_on(own)
    return [tag("p", sentence, class_="hint"), comparison_table(run.comparison)]


def _tradeoff(run: RunFolder) -> Content:
    models = measured(run)
    items = [tag("li", mark_of(each), f" {each.number} ", each.name) for each in models]
    return tradeoff_panels(models, HINT, tag("ul", items, class_="key", aria_label="Key of the charts"))


def _kept(run: RunFolder) -> Content:
    kept = {name: units for name, results in run.results.items() if any((units := results.kept_units()).values())}
    if not kept:
        return absent(
            "Nothing is known about single layers: nothing was pruned, or the models' results.json is not there."
        )
    hint = "Units that are left in each layer; the stronger the shade, the larger the share of the dense model's."
    return [tag("p", hint, class_="hint"), tag("div", heat_maps(kept), class_="maps")]


def _training(run: RunFolder) -> Content:
    facts = [results.training for results in run.results.values() if results.training]
    known = [pairs(facts[-1])] if facts and not run.history else []
    if not run.history:
        return [absent("There are no curves: no log of training was kept."), known]
    charts = training_charts(run.history)
    if not charts:
        return [
            absent("There are no curves: nothing was logged; see logging_steps among the training arguments."),
            known,
        ]
    total = sum(log.steps for log in run.history)
    hint = f"Over {total:,} optimizer steps"
    if len(run.history) > 1:
        names = ", ".join(f"{number} is {log.name}" for number, log in enumerate(run.history, 1))
        hint += f"; the stages, numbered above each chart: {names}. Sparsities are of what a stage begins with"
    hint += ". Dotted lines are targets."
    return [tag("p", hint, class_="hint"), tag("div", charts, class_="panels")]


def _load(run: RunFolder) -> Content:
    own = run.results.get(run.main or "")
    if own is None:
        return absent("How to load the model is not known: its results.json is not there.")
    code = loading_code(own.auto_class, processor_class=own.processor_class)
    return [
        tag("p", needs(own.requires)),
        code_block("Python code that loads the model", code),
    ]


def _recipe(run: RunFolder) -> Content:
    if run.recipe is None:
        return absent("There is no recipe.")
    stored = run.path / RECIPE_FILE
    written = stored.read_text(encoding="utf-8") if stored.is_file() else run.recipe.to_yaml()
    return code_block("Recipe", written)


def _environment(run: RunFolder) -> Content:
    found: dict[str, Any] = {}
    if run.comparison is not None:
        found |= run.comparison.environment
    if run.recipe is not None:
        found |= seeds_of(run.recipe)
    return pairs(found) if found else absent("Nothing is known about versions and hardware.")


def seeds_of(recipe: Recipe) -> dict[str, str]:
    """Return the seeds that a recipe sets, those of its stages one after another."""
    found = {}
    for name in SEEDS:
        values = [(run.training or {}).get(name) for run in recipe.runs()]
        if any(value is not None for value in values):
            words = [str(value) if value is not None else "not set" for value in values]
            found[name] = ", then ".join(dict.fromkeys(words))
    return found or {"seed": "not set in the recipe: transformers' default"}


def _notes(run: RunFolder) -> Content:
    lines = [*run.notes, *(run.comparison.notes if run.comparison is not None else ())]
    lines += [check for results in run.results.values() for check in results.checks]
    return bullets(list(dict.fromkeys(lines))) if lines else absent("There are none.")
