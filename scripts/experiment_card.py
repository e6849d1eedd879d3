"""The card of an experiment: tables, pictures and text, from its results alone."""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from experiment import BASELINE, METHODS, OURS
from huggingface_hub import ModelCardData
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_compress.config.recipe import DENSE
from hf_compress.recipe.stages import SMALL
from hf_compress.recipe.tasks.classification import ClassificationTask
from hf_compress.report.plots import KeptUnits, plot_kept_units

RESULTS, CARD, CURVES, KEPT = "results.json", "README.md", "curves.png", "kept_units.png"
ACCURACY = ClassificationTask.accuracy
EQUAL = 2.0
"""Sparsities of the encoder, in points, that count as equal."""

COLORS = {OURS: "#1f6f8b", BASELINE: "#b5523b", DENSE: "#24292f"}

Run = dict[str, Any]


def write_report(folder: Path, data: dict[str, Any]) -> None:
    """Write the card and its pictures.

    Args:
        folder: Where ``results.json`` lies.
        data: What is in it; one run at least.
    """
    plot_curves(data, folder / CURVES)
    shown = shown_run(data["runs"])
    units = {kind: [KeptUnits(**unit) for unit in found] for kind, found in shown["kept"].items()}
    if any(units.values()):
        plot_kept_units(units, folder / KEPT)
    (folder / CARD).write_text(card(data), encoding="utf-8")


def shown_run(runs: list[Run]) -> Run:
    """Return the run whose units are drawn: of our recipe if there is one, of medium sparsity, the first seed."""
    mine = [run for run in runs if run["method"] == OURS] or runs
    sparsities = sorted({run["sparsity"] for run in mine})
    chosen = sparsities[len(sparsities) // 2]
    return min((run for run in mine if run["sparsity"] == chosen), key=lambda run: run["seed"])


def of(runs: Iterable[Run], method: str, sparsity: float) -> list[Run]:
    """Return the runs of a method at a sparsity."""
    return [run for run in runs if (run["method"], run["sparsity"]) == (method, sparsity)]


def profiled(name: str, model: str = SMALL) -> Callable[[Run], float]:
    """Return what reads a quantity of a model's profile from a run."""
    return lambda run: run["comparison"]["profiles"][model][name]


def encoder_sparsity(run: Run) -> float:
    """Return the share of the stacks' parameters that is gone, in per cent."""
    dense, small = (profiled("encoder_parameters", model)(run) for model in (DENSE, SMALL))
    return 100 * (1 - small / dense)


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Return mean and, of several, standard deviation."""
    found = list(values)
    text = f"{mean(found):.{digits}f}"
    return f"{text} \u00b1 {stdev(found):.{digits}f}" if len(found) > 1 else text


def table(data: dict[str, Any]) -> str:
    """Return the table: a row for the dense model, and one for every method and sparsity."""
    runs, metric = data["runs"], data["settings"]["experiment"]["metric"]
    labels = list(runs[0]["comparison"]["latency_ms"])
    head = ["", "asked for", "encoder sparsity (%)", metric, "parameters", "operations", "weights on disk"]
    head += [f"{what}, {label}" for label in labels for what in ("latency", "speed-up")]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], _row(runs, DENSE, metric, labels)]
    for sparsity in sorted({run["sparsity"] for run in runs}):
        for method in METHODS:
            mine = of(runs, method, sparsity)
            if mine:
                name = f"{method} ({len(mine)} {'seed' if len(mine) == 1 else 'seeds'})"
                row = _row(mine, SMALL, metric, labels)
                rows.append([name, f"{100 * sparsity:g} %", spread(map(encoder_sparsity, mine)), *row[3:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(runs: list[Run], model: str, metric: str, labels: list[str]) -> list[str]:
    def average(read: Callable[[Run], float]) -> float:
        return mean(map(read, runs))

    scores = [run["comparison"]["metrics"][metric][model] for run in runs]
    if model == DENSE and len(set(scores)) == 1:
        scores = scores[:1]  # the same model in all runs, unless a recipe trains it
    row = [
        model,
        "-",
        "-",
        spread(scores, 2),
        f"{average(profiled('parameters', model)) / 1e6:.3f} M",
        f"{average(profiled('flops', model)) / 1e9:.4f} G",
        f"{average(lambda run: _bytes(run, model)) / 1e6:.2f} MB",
    ]
    for label in labels:
        row.append(f"{average(lambda run, at=label: run['comparison']['latency_ms'][at][model]):.2f} ms")
        faster = [run["comparison"]["speedup"][label].get(model) for run in runs]
        row.append("-" if None in faster else f"{mean(faster):.2f}x")
    return row


def _bytes(run: Run, model: str) -> int:
    profile = run["comparison"]["profiles"][model]
    found: int = profile["measured_bytes"] or profile["bytes_on_disk"]
    return found


def differences(data: dict[str, Any]) -> list[str]:
    """Say by how much our recipe and the baseline differ, where there are both."""
    metric, runs = data["settings"]["experiment"]["metric"], data["runs"]
    better = 1 if data["settings"]["experiment"]["higher_is_better"] else -1
    lines = []
    for sparsity in sorted({run["sparsity"] for run in runs}):
        each = [of(runs, method, sparsity) for method in METHODS]
        if all(each):
            scores = [[run["comparison"]["metrics"][metric][SMALL] for run in mine] for mine in each]
            outcome = _outcome(scores[0], scores[1], better, metric)
            lines.append(f"- at {100 * sparsity:g} %: {outcome}{_unequal(each)}")
    return lines


def _unequal(runs: list[list[Run]]) -> str:
    """Say so if the models that are compared are not equally sparse."""
    ours, baseline = (mean(map(encoder_sparsity, mine)) for mine in runs)
    if abs(ours - baseline) <= EQUAL:
        return ""
    return f"; not at equal sparsity: {OURS} lost {ours:.0f} % of the encoder, {BASELINE} {baseline:.0f} %"


def _outcome(ours: list[float], baseline: list[float], better: int, metric: str) -> str:
    """Say who is ahead, and whether seeds could be the reason: a gap counts if it is more than twice its error."""
    gap = mean(ours) - mean(baseline)
    if gap == 0:
        return f"{OURS} and {BASELINE} are level ({metric})"
    ahead, behind = (OURS, BASELINE) if better * gap > 0 else (BASELINE, OURS)
    text = f"{ahead} is ahead of {behind} by {abs(gap):.2f} ({metric})"
    if min(len(ours), len(baseline)) < 2:
        return f"{text}, one seed: how much seeds differ is not known"
    error = (stdev(ours) ** 2 / len(ours) + stdev(baseline) ** 2 / len(baseline)) ** 0.5
    seeds = f"{len(ours)} and {len(baseline)} seeds"
    if abs(gap) <= 2 * error:
        return f"{text}, within the spread of {seeds} (standard error of the gap {error:.2f})"
    return f"{text}, more than twice the gap's standard error over {seeds} ({error:.2f})"


def plot_curves(data: dict[str, Any], path: Path) -> None:
    """Draw the metric against the sparsity of the encoder: a line a method, dots for seeds, the dense model dotted."""
    about, runs = data["settings"]["experiment"], data["runs"]
    metric = about["metric"]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method in METHODS:
        sparsities = sorted({run["sparsity"] for run in runs if run["method"] == method})
        groups = [of(runs, method, sparsity) for sparsity in sparsities]
        if not groups:
            continue
        scores = [[run["comparison"]["metrics"][metric][SMALL] for run in group] for group in groups]
        places = [mean(map(encoder_sparsity, group)) for group in groups]
        axes.plot(places, [mean(each) for each in scores], "-", color=COLORS[method], label=method)
        for group, values in zip(groups, scores, strict=True):
            axes.plot([encoder_sparsity(run) for run in group], values, "o", markersize=4, color=COLORS[method])
    dense = mean(run["comparison"]["metrics"][metric][DENSE] for run in runs)
    axes.axhline(dense, color=COLORS[DENSE], linewidth=0.8, linestyle=":", label=DENSE)
    if not about["higher_is_better"]:
        axes.set_yscale("log")
    axes.set_title(about["title"], fontsize=10)
    axes.set_xlabel("encoder sparsity (%)")
    axes.set_ylabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def card(data: dict[str, Any]) -> str:
    """Return the text of the card."""
    about, runs = data["settings"]["experiment"], data["runs"]
    shown, examples = shown_run(runs), runs[0]["examples"]
    steps = sorted({run["steps"] for run in runs})
    metadata = ModelCardData(
        license=about["license"],
        library_name="transformers",
        tags=["hf-compress", "model-compression", "pruning", "distillation"],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {about['title']}",
        f"A stand-in for {about['stands_for']}, made of what can be had without the Hub. It is not "
        f"{about['stands_for']}: its numbers say how the methods compare with each other here, and nothing about "
        "results published there.",
        f"- data: {about['data']}\n- model: {about['model']}\n- {examples['training']:,} training examples, metrics on "
        f"{examples['evaluation']:,} test examples",
        "## Results",
        f"`{OURS}` is the recipe below, `{BASELINE}` the same number of steps ({', '.join(map(str, steps))}) with the "
        "norms of weights as criterion and without distillation; both begin with the same dense model. Means over "
        f"seeds, with standard deviations of several. What is asked for is {_asked(about)}; encoder sparsity is the "
        "share of the parameters of all stacks of layers, decoders included, that is gone. Latencies are medians of "
        "each run, timed beside the dense model, on a machine that other processes share; speed-ups are ratios within "
        "a run.",
        table(data),
        "\n".join([*differences(data), *_standard_error(data)]),
        f"![{about['metric']} against encoder sparsity]({CURVES})",
    ]
    if any(shown["kept"].values()):
        parts += [
            "## What every layer kept",
            f"`{shown['method']}`, {100 * shown['sparsity']:g} % asked for, seed {shown['seed']}:",
            f"![Units kept per layer]({KEPT})",
        ]
    parts += ["## Recipe", *_recipe(data), "## Data and dense model", *_origins(data)]
    parts += ["## Measured with", _yaml(runs[-1]["comparison"]["environment"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _asked(about: dict[str, Any]) -> str:
    if about.get("levels"):
        return "a level, whose settings are below"
    found = ", ".join(f"{100 * share:g} % of {name}" for name, share in about["limits"].items())
    limits = f", at most {found}, so that every layer keeps one" if found else ""
    return f"the share of each structure's units that goes{limits}"


def _standard_error(data: dict[str, Any]) -> list[str]:
    """Say how far an accuracy may be off by the choice of the test examples; other metrics have no simple formula."""
    metric, run = data["settings"]["experiment"]["metric"], data["runs"][0]
    if metric != ACCURACY:
        return []
    share, examples = run["comparison"]["metrics"][metric][DENSE] / 100, run["examples"]["evaluation"]
    error = 100 * (share * (1 - share) / examples) ** 0.5
    return [f"- one standard error of the dense model's accuracy on {examples:,} examples is {error:.2f} points"]


def _recipe(data: dict[str, Any]) -> list[str]:
    about, scale = data["settings"]["experiment"], data["settings"]["steps_scale"]
    seconds = [run["seconds"] for run in data["runs"]]
    more = "more than " if None in seconds else ""
    minutes = f"{more}{sum(each or 0 for each in seconds) / 60:.0f} minutes"
    scaled = f", steps times {scale:g}" if scale != 1 else ""
    levels = about.get("levels", {})
    what = "those of a level" if levels else f"sparsities of {', '.join(about['structures'])}"
    more_settings = {name: about[name] for name in ("limits", "levels") if about.get(name)}
    return [
        f"`scripts/recipes/{about['recipe']}` with these settings in the place of its own{scaled}, and {what}:",
        _yaml({**about["settings"], **more_settings}),
        f"For `{BASELINE}`, moreover:",
        _yaml(about["baseline"]),
        f"`python scripts/experiments.py --only {about['name']}`: {len(data['runs'])} runs, {minutes} "
        "in all, evaluation and timing included.",
    ]


def _origins(data: dict[str, Any]) -> list[str]:
    parts = ["Packages and versions:", _yaml(data.get("sources", {}))]
    if "dense_training" in data:
        parts += ["Training of the dense model:", _yaml(data["dense_training"])]
    return [*parts, f"sha256 of the dense model's weights: `{data['settings']['dense_sha256']}`"]


def _yaml(facts: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}```"
