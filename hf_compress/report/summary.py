"""What a run came to, in plain words and in a few large numbers."""

from math import isfinite

from hf_compress.config import Recipe
from hf_compress.report.compare import Comparison
from hf_compress.report.folders import RunFolder
from hf_compress.report.markup import Markup, tag
from hf_compress.report.profile import ModelProfile
from hf_compress.report.tradeoff import is_better_small

METHODS = ("pruning", "quantization", "distillation")


def title_of(run: RunFolder) -> str:
    """Return the name of what was compressed."""
    own = run.results.get(run.main or "")
    if own is not None:
        return own.name
    if run.recipe is not None and run.recipe.model is not None:
        return f"{_last_part(run.recipe.model)}, compressed"
    return run.path.resolve().name


def summary(run: RunFolder) -> str:
    """Return a paragraph: what was done, and how the result compares with the dense model."""
    sentences = [_done(run)]
    if run.comparison is None or run.main is None:
        sentences.append("The run is not finished: there is no comparison with the dense model yet.")
        return " ".join(sentences)
    table, name = run.comparison, run.main
    dense, *_ = table.profiles
    own, reference = table.profiles[name], table.profiles[dense]
    share = f"{own.parameters / reference.parameters:.0%} of the parameters of the dense model"
    if own.encoder_parameters is not None and reference.encoder_parameters:
        share += f" ({own.encoder_parameters / reference.encoder_parameters:.0%} of those in the encoder)"
    sentences.append(f"The result ({name}) has {share} and takes {own.flops / reference.flops:.0%} of the operations.")
    sentences += [text for metric in table.metrics if (text := _metric(table, metric, dense, name))]
    speeds = [
        f"{ratios[name]:.2f} times as fast at {label}" for label, ratios in table.speedup.items() if name in ratios
    ]
    if speeds:
        sentences.append(f"It is {' and '.join(speeds)}.")
    return " ".join(sentences)


def key_facts(run: RunFolder) -> Markup | None:
    """Return the numbers that matter most, large."""
    if run.comparison is None or run.main is None:
        return None
    table, name = run.comparison, run.main
    dense, *_ = table.profiles
    own, reference = table.profiles[name], table.profiles[dense]
    facts = [
        (
            metric,
            f"{values[name]:.2f}",
            f"{dense}: {values[dense]:.2f}" if dense in values else f"{dense}: not measured",
        )
        for metric, values in table.metrics.items()
        if name in values
    ]
    facts += [
        (label, f"{mine / whole:.0%}", f"of {dense}")
        for label, mine, whole in (
            ("parameters", own.parameters, reference.parameters),
            ("operations", own.flops, reference.flops),
            ("weights on disk", _bytes(own), _bytes(reference)),
        )
        if whole
    ]
    facts += [
        (f"speed-up, {label}", f"{ratios[name]:.2f}x", f"{table.latency_ms[label][name]:.2f} ms")
        for label, ratios in table.speedup.items()
        if name in ratios and name in table.latency_ms.get(label, {})
    ]
    shown = [tag("div", tag("dt", label), tag("dd", value), tag("dd", beside)) for label, value, beside in facts]
    return tag("dl", shown, class_="facts", aria_label=f"{name} beside {dense}")


def _done(run: RunFolder) -> str:
    recipe = run.recipe
    if recipe is None:
        data = next((f" on {results.dataset}" for results in run.results.values()), "")
        return f"A model was compressed{data}."
    runs = recipe.runs()
    methods = [name for name in METHODS if any(getattr(each, name) is not None for each in runs)]
    steps = f" in {len(runs)} stages" if len(runs) > 1 else ""
    verb = "is to be" if run.comparison is None else "was"
    return f"The model {_model(run, recipe)} {verb} compressed{steps}{_data(run, recipe)} by {_listed(methods)}."


def _model(run: RunFolder, recipe: Recipe) -> str:
    if recipe.model is not None:
        return _last_part(recipe.model)
    return next((results.base_model for results in run.results.values()), "of the recipe")


def _data(run: RunFolder, recipe: Recipe) -> str:
    if recipe.dataset is not None:
        return f" on {_last_part(recipe.dataset.path)}"
    return next((f" on {results.dataset}" for results in run.results.values()), "")


def _metric(table: Comparison, metric: str, dense: str, name: str) -> str | None:
    values = table.metrics[metric]
    if name not in values:
        return None
    if dense not in values or not isfinite(values[name] - values[dense]):
        return f"Its {metric} is {values[name]:.2f}."
    change = values[name] - values[dense]
    if f"{abs(change):.2f}" == "0.00":
        return f"Its {metric} is {values[name]:.2f}, as that of the dense model."
    word = "better" if (change < 0) == is_better_small(metric) else "worse"
    beside = f"{abs(change):.2f} {word} than that of the dense model ({values[dense]:.2f})"
    return f"Its {metric} is {values[name]:.2f}, {beside}."


def _bytes(profile: ModelProfile) -> int:
    return profile.measured_bytes or profile.bytes_on_disk


def _last_part(name: str) -> str:
    """A Hub name as it is, a path without the folders around it."""
    return name if name.count("/") == 1 and not name.startswith("/") else name.rstrip("/").rpartition("/")[2] or name


def _listed(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
