"""Every pruning method on the same task: the same dense model, steps, seeds and encoder sparsity for all.

usage: .venv/bin/python scripts/bench/methods.py --json FILE [--tasks movies wordnet] [--methods taylor l2 ...]
           [--sparsities 0.5 0.75 0.9] [--seeds 0] [--steps 600] [--start pretrained] [--allocation global]
           [--dense-steps 300] [--update-every N] [--workers 1]

Tasks: movie-review snippets with MiniLM (``movies``), and three-way relations between WordNet's nouns (``wordnet``).
Each method starts from the pretrained model (``--start pretrained``: it prunes while the model is fine-tuned, as
movement pruning was published) or from the dense fine-tuned model (``--start finetuned``). It prunes heads and
feed-forward units to the given fraction between a tenth and the half of the steps, and trains what is left to their
end, with the task loss alone; then ``shrink`` removes what was pruned, and the small model is evaluated. AdamW, linear
decay, learning rates of ``--learning-rate``. ``encoder left`` is the share of the encoder's weights that the small
model has. The dense model, fine-tuned for ``--dense-steps`` steps, is what all are compared with.

Results are kept in the JSON file as they come: a run that is stopped goes on where it was, more seeds or methods are
added to what is there. Settings other than those in the file are refused. A table and a plot go beside it. With
``--workers`` runs go side by side, each in a process of its own.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods_plot import plot  # noqa: E402
from methods_work import TASKS, Settings, dense_of, run_of  # noqa: E402

from hf_compress.registry import criteria  # noqa: E402
from hf_compress.report.environment import environment  # noqa: E402

BASELINES = ("random", "l2")
EXPECTED_AHEAD = ("taylor", "movement", "grain")
"""What has to beat both baselines clearly."""

WHY = {
    "admm": "pulls units that it chooses by their norm towards zero, and removes all of them at once at the end",
    "apoz": "counts zeros behind the activation function, and GELU gives hardly any",
    "fpgm": "asks which units are unlike the others, not what the loss makes of them",
    "l0": "learns a probability for every gate, which takes more steps than these",
    "l1": "norms of pretrained units are nearly equal, and say little of what the loss makes of them",
    "l2": "norms of pretrained units are nearly equal, and say little of what the loss makes of them",
    "level": "magnitudes of pretrained units are nearly equal, and say little of what the loss makes of them",
    "mean_activation": "sees how active a unit is, not whether anything is made of it",
    "movement": "adds up signed gradients, whose mean is near zero once the model fits: in some hundred steps the "
    "units that matter most drift furthest, in either direction; its publication takes ten thousand steps and more",
    "slim": "learns its factors against a penalty, which takes more steps than these",
}
"""Why a method may be no better than chance in a comparison of a few hundred steps."""

Runs = list[dict[str, Any]]


def usable() -> list[str]:
    """Return the methods that prune heads and feed-forward units."""
    trained = [name for name in criteria if criteria.get(name).trains]
    return [name for name in trained if {"heads", "ffn"} <= criteria.get(name).structures]


def found(runs: Runs, task: str, method: str, sparsity: float) -> list[float]:
    """Return the accuracies of all seeds."""
    wanted = (task, method, sparsity)
    return [run["accuracy"] for run in runs if (run["task"], run["method"], run["sparsity"]) == wanted]


def cell(values: list[float]) -> str:
    """Return mean and spread in percent."""
    if not values:
        return "-"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def table(data: dict[str, Any], task: str) -> str:
    """Return the accuracies of one task as Markdown, the best mean first."""
    runs: Runs = [run for run in data["runs"] if run["task"] == task]
    sparsities = sorted({run["sparsity"] for run in runs})
    names = sorted({run["method"] for run in runs}, key=lambda name: -_score(runs, task, name, sparsities))
    head = ["accuracy (%)", *(f"{s:.0%} sparse" for s in sparsities), "encoder left (%)"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in names:
        mine = [run for run in runs if run["method"] == name]
        left = [mean(run["encoder_left"] for run in mine if run["sparsity"] == s) for s in _have(mine, sparsities)]
        row = [f"`{name}`", *(cell(found(runs, task, name, s)) for s in sparsities)]
        row.append(", ".join(f"{100 * each:.0f}" for each in left))
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _have(runs: Runs, sparsities: list[float]) -> list[float]:
    return [sparsity for sparsity in sparsities if any(run["sparsity"] == sparsity for run in runs)]


def _score(runs: Runs, task: str, name: str, sparsities: list[float]) -> float:
    """Return the mean accuracy; methods that lack a sparsity come last."""
    values = [found(runs, task, name, sparsity) for sparsity in sparsities]
    return mean(mean(each) for each in values) if all(values) else -1.0


def verdicts(data: dict[str, Any], task: str) -> list[str]:
    """Return which methods are ahead of both baselines, and which are not ahead of chance."""
    runs: Runs = [run for run in data["runs"] if run["task"] == task]
    sparsities = sorted({run["sparsity"] for run in runs})
    scores = {name: _score(runs, task, name, sparsities) for name in {run["method"] for run in runs}}
    scores = {name: score for name, score in scores.items() if score >= 0}
    if not all(name in scores for name in BASELINES):
        return []
    best = max(scores[name] for name in BASELINES)
    lines = [
        f"- `{name}` is {100 * (scores[name] - best):+.1f} points from the better of `random` and `l2`, averaged over "
        "the sparsities."
        for name in EXPECTED_AHEAD
        if name in scores
    ]
    behind = [name for name in sorted(scores) if name != "random" and scores[name] <= scores["random"]]
    if behind:
        lines.append(f"- Not ahead of chance: {', '.join(f'`{name}`' for name in behind)}.")
        lines += [f"    - `{name}`: {WHY[name]}." for name in behind if name in WHY]
    return lines


def report(data: dict[str, Any]) -> str:
    """Return everything that is printed at the end, as Markdown."""
    settings = data["settings"]
    parts = []
    for task in dict.fromkeys(run["task"] for run in data["runs"]):
        seeds = sorted({run["seed"] for run in data["runs"] if run["task"] == task})
        dense = data["dense"][task]
        parts += [f"## {TASKS[task].title}"]
        parts += [
            f"Dense: {100 * dense['accuracy']:.1f} % on {dense['examples']:,} examples (one standard error is "
            f"{100 * (dense['accuracy'] * (1 - dense['accuracy']) / dense['examples']) ** 0.5:.1f} points). "
            f"{settings['steps']} steps of {settings['batch_size']} examples from the {settings['start']} model, seeds "
            f"{seeds}."
        ]
        parts += [table(data, task), "\n".join(verdicts(data, task))]
    return "\n\n".join(part for part in parts if part)


def write(path: Path, data: dict[str, Any]) -> None:
    """Write the JSON file, the table and the plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    about = data["environment"]
    device = about["cpu"] if about["gpu"] == "none" else about["gpu"]
    title = f"# Pruning methods, side by side\n\nWritten by `scripts/bench/methods.py`; {device}, torch"
    title += f" {about['torch']}, transformers {about['transformers']}."
    picture = f"![Accuracy against encoder sparsity]({path.stem}.png)"
    text = f"{title}\n\n{report(data)}\n\n{picture}\n\n```\n{explained}```\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(data, path.with_suffix(".png"))


def loaded(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what earlier runs left in the file, or an empty start."""
    if not path.exists():
        return {"environment": environment(), "settings": settings, "dense": {}, "runs": []}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data["settings"] != settings:
        sys.exit(
            f"error: {path} holds results of other settings ({data['settings']}); these are {settings}. Give the same, "
            "or another file."
        )
    return data


def results(keys: list[dict[str, Any]], settings: Settings, workers: int) -> Iterator[dict[str, Any]]:
    """Do runs, and give back each as it ends.

    Raises:
        RuntimeError: If runs failed, once all others are done.
    """
    failed = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(run_of, settings=settings, **key): key for key in keys}
        for done in as_completed(started):
            if done.exception() is None:
                yield {**started[done], **done.result()}
            else:
                failed.append(f"{started[done]}: {done.exception()!r}")
                print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {'; '.join(failed)}")


def main() -> None:
    """Run what is missing, and write after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of all results")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["movies"])
    parser.add_argument("--methods", nargs="+", choices=usable(), default=usable())
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--start", choices=("pretrained", "finetuned"), default="pretrained")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of a pruning run")
    parser.add_argument("--dense-steps", type=int, default=300, help="optimizer steps of the dense model")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--allocation", default="global")
    parser.add_argument("--update-every", type=int, help="steps between choices of masks (default: 50 choices)")
    parser.add_argument("--examples", type=int, help="use so many training and test examples only")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1)")
    given = parser.parse_args()
    if given.workers < 1:
        parser.error("--workers must be at least 1")
    settings = Settings(**{each.name: getattr(given, each.name) for each in fields(Settings)})
    data = loaded(given.json, settings.to_dict())
    for task in given.tasks:
        if task not in data["dense"]:
            data["dense"][task] = dense_of(task, settings)
    places = ("task", "seed", "sparsity", "method")
    keys = [
        dict(zip(places, place, strict=True))
        for place in itertools.product(given.tasks, given.seeds, given.sparsities, given.methods)
    ]
    missing = [key for key in keys if not any(key.items() <= run.items() for run in data["runs"])]
    if given.workers == 1:
        found = ({**key, **run_of(settings=settings, **key)} for key in missing)
    else:
        found = results(missing, settings, given.workers)
    for run in found:
        data["runs"].append(run)
        print(json.dumps(run), file=sys.stderr, flush=True)
        write(given.json, data)
    write(given.json, data)
    print(report(data))


if __name__ == "__main__":
    main()
