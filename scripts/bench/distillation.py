"""What distillation is worth: the same pruned student, trained as long, without a teacher and with one.

usage: .venv/bin/python scripts/bench/distillation.py --json FILE [--task wordnet] [--seeds 0 1 2] [--steps 100]
           [--dense-steps 3000] [--sparsity 0.75] [--workers 2]

MiniLM is fine-tuned for the task. From it, Taylor pruning takes the given fraction of heads and feed-forward units
between a tenth and the half of the steps, and what is left is trained to their end:
  none              with the task loss alone
  logits            0.1 * task + 0.9 * KL of the logits, temperature 2, the dense model as teacher
  logits + hidden   the same, and the mean squared error of hidden states, each layer of the student with the layer of
                    the teacher that is nearest in this batch (dynamic)
Then ``shrink`` removes what was pruned, and the small model is evaluated. Same data order, steps and learning rate for
all; results are kept in the JSON file as they come, and a run that is stopped goes on where it was.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods_work import TASKS, Settings, dense_of, run_of  # noqa: E402

from hf_compress import DistillationConfig  # noqa: E402
from hf_compress.report.environment import environment  # noqa: E402

KINDS: dict[str, DistillationConfig | None] = {
    "none": None,
    "logits": DistillationConfig(alpha=0.9, temperature=2.0),
    "logits + hidden": DistillationConfig(
        alpha=0.9, temperature=2.0, features=({"loss": "hidden_mse", "layers": "dynamic"},)
    ),
}


def table(runs: list[dict[str, Any]]) -> str:
    """Return the accuracies as Markdown."""
    seeds = sorted({run["seed"] for run in runs})
    lines = [["distillation", *(f"seed {seed}" for seed in seeds), "mean", "spread"]]
    lines.append(["---", *["---:"] * (len(seeds) + 2)])
    for kind in KINDS:
        found = {run["seed"]: 100 * run["accuracy"] for run in runs if run["kind"] == kind}
        values = list(found.values())
        row = [kind, *(f"{found[seed]:.1f}" if seed in found else "-" for seed in seeds)]
        row.append(f"{mean(values):.1f}" if values else "-")
        row.append(f"{stdev(values):.1f}" if len(values) > 1 else "-")
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """Return by how much each kind is ahead of none, beside the spread of the seeds."""
    by_kind = {kind: [100 * run["accuracy"] for run in runs if run["kind"] == kind] for kind in KINDS}
    if any(len(values) < 2 for values in by_kind.values()):
        return []
    plain = by_kind["none"]
    lines = []
    for kind, values in by_kind.items():
        if kind != "none":
            margin, spread = mean(values) - mean(plain), max(stdev(values), stdev(plain))
            verdict = "more" if margin > spread else "not more"
            lines.append(f"- `{kind}` is {margin:+.1f} points from `none`: {verdict} than the spread of {spread:.1f}.")
    return lines


def report(data: dict[str, Any]) -> str:
    """Return everything that is printed at the end, as Markdown."""
    settings, dense = data["settings"], data["dense"]
    intro = (
        f"{TASKS[data['task']].title}. Dense: {100 * dense['accuracy']:.1f} % on {dense['examples']:,} examples. "
        f"{data['sparsity']:.0%} of heads and feed-forward units pruned, {settings['steps']} steps of "
        f"{settings['batch_size']} examples."
    )
    return "\n\n".join(part for part in (intro, table(data["runs"]), "\n".join(verdicts(data["runs"]))) if part)


def write(path: Path, data: dict[str, Any]) -> None:
    """Write the JSON file, and the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    about = data["environment"]
    device = about["cpu"] if about["gpu"] == "none" else about["gpu"]
    title = f"# What distillation is worth\n\nWritten by `scripts/bench/distillation.py`; {device}, torch"
    title += f" {about['torch']}, transformers {about['transformers']}."
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    path.with_suffix(".md").write_text(f"{title}\n\n{report(data)}\n\n```\n{explained}```\n", encoding="utf-8")


def loaded(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what earlier runs left in the file, or an empty start."""
    if not path.exists():
        return {"environment": environment(), **settings, "dense": {}, "runs": []}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    there = {name: data[name] for name in settings}
    if there != settings:
        sys.exit(f"error: {path} holds results of other settings ({there}); these are {settings}. Give another file.")
    return data


def results(
    pairs: list[tuple[int, str]], task: str, settings: Settings, sparsity: float, workers: int
) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    """Do runs, and give back each as it ends; no workers: in this process."""
    if workers < 1:
        for seed, kind in pairs:
            yield (seed, kind), run_of(task, settings, "taylor", sparsity, seed, KINDS[kind])
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = {
            pool.submit(run_of, task, settings, "taylor", sparsity, seed, KINDS[kind]): (seed, kind)
            for seed, kind in pairs
        }
        for future in as_completed(started):
            yield started[future], future.result()


def main() -> None:
    """Run what is missing, and write after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of all results")
    parser.add_argument("--task", choices=list(TASKS), default="wordnet")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a pruning run")
    parser.add_argument("--dense-steps", type=int, default=3000, help="optimizer steps of the dense model")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--examples", type=int, help="use so many training and test examples only")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side, in processes (default: none)")
    given = parser.parse_args()
    names = ("steps", "dense_steps", "batch_size", "max_length", "learning_rate", "examples")
    settings = Settings(start="finetuned", allocation="global", **{name: getattr(given, name) for name in names})
    data = loaded(given.json, {"settings": settings.to_dict(), "task": given.task, "sparsity": given.sparsity})
    data["dense"] = data["dense"] or dense_of(given.task, settings)
    done = {(run["seed"], run["kind"]) for run in data["runs"]}
    missing = [pair for pair in itertools.product(given.seeds, KINDS) if pair not in done]
    for (seed, kind), found in results(missing, given.task, settings, given.sparsity, given.workers):
        data["runs"].append({"seed": seed, "kind": kind, **found})
        print(json.dumps(data["runs"][-1]), file=sys.stderr, flush=True)
        write(given.json, data)
    print(report(data))


if __name__ == "__main__":
    main()
