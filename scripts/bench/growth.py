"""How the cost of compression grows with the model: depth, width, length of texts, number of parameters.

usage: .venv/bin/python scripts/bench/growth.py [--rounds 6] [--json FILE]

Every point is a process of its own with one thread. Seconds are CPU seconds, the median of three calls, after the
package was used once on a tiny model. Half of the heads and feed-forward units go.
  graph     the recorded forward pass and the dimension groups
  shrink    ``shrink``: graph, plan, copy, cut, and comparison of outputs with the masked model's
  plan      ``plan_shrink``, graph included, of a model without weights (meta device, fake tensors)
  memory    what the process's peak rises by from the built model to the plan
  step      a step of the Trainer with pruning gates, or with int8 QAT, over the plain step, as in ``overhead.py``
The exponent is the slope of a line through the logarithms: 1 is proportional, 0 does not grow. The lower half of the
points is left out, where constant costs hide it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from growth_work import BERTS, LLAMAS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from overhead import ratios, table

from hf_compress.report.environment import environment

HERE = Path(__file__).resolve().parent
BASE = {"layers": 4, "width": 256, "length": 32}
SERIES = {
    "layers": ("layers", [2, 4, 8, 16, 32, 48]),
    "width": ("width", [128, 256, 512, 1024, 2048]),
    "length": ("tokens of a text", [16, 64, 256, 512, 1024]),
}
STEPS = ("BERT-tiny", "BERT-mini", "BERT-small", "BERT-medium", "BERT-base")
METHODS = {"gates": "pruning gates", "int8 QAT": "int8 QAT"}
COLORS = ("#1f6f8b", "#b5523b", "#8a939b")

Points = Sequence[tuple[float, Mapping[str, float]]]
"""What grows, and what was measured there."""


def run(script: str, *words: str) -> Any:
    """Do one measurement in a new process."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {script} {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(rounds: int) -> dict[str, Any]:
    """Measure everything."""
    found: dict[str, Any] = {"series": {}, "shapes": {}, "steps": {}}
    for name, (_, values) in SERIES.items():
        found["series"][name] = []
        for value in values:
            print(f"{name} {value}", file=sys.stderr)
            found["series"][name].append([value, run("growth_work.py", "bert", json.dumps({**BASE, name: value}))])
    for name in (*BERTS, *LLAMAS):
        print(name, file=sys.stderr)
        found["shapes"][name] = run("growth_work.py", "shape", name)
    for name in STEPS:
        print(f"steps of {name}", file=sys.stderr)
        found["steps"][name] = run("overhead_work.py", "time", name, str(rounds), "1")
    return found


def exponent(points: Points, key: str) -> float:
    """Return the slope of the logarithms over the upper half of the points."""
    upper = sorted(points, key=lambda each: each[0])[len(points) // 2 :]
    xs, ys = [math.log(x) for x, _ in upper], [math.log(values[key]) for _, values in upper]
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread


def by_size(shapes: Mapping[str, Mapping[str, float]]) -> Points:
    """Return the models without weights as points over their numbers of parameters."""
    return [(values["parameters"], values) for values in shapes.values()]


def report(data: Mapping[str, Any]) -> str:
    """Return the tables."""
    parts = []
    for name, points in data["series"].items():
        label = SERIES[name][0]
        fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != name)
        keys = ("graph", "shrink", "forward pass")
        rows = [[label, *(f"{key} (s)" for key in keys), "parameters"]]
        rows += [[str(x), *(f"{v[key]:.3f}" for key in keys), f"{v['parameters'] / 1e6:.1f} M"] for x, v in points]
        rows.append(["exponent", *(f"{exponent(points, key):.2f}" for key in keys), ""])
        parts += [f"## By {label}", f"A BERT with weights: {fixed}.", table(rows)]
    rows = [["", "parameters", "graph (s)", "plan (s)", "memory (MiB)"]]
    for name, v in data["shapes"].items():
        row = [name, f"{v['parameters'] / 1e6:,.1f} M", f"{v['graph']:.3f}", f"{v['plan']:.3f}"]
        rows.append([*row, f"{v['memory'] / 2**20:.0f}"])
    points = by_size(data["shapes"])
    rows.append(["exponent", "", f"{exponent(points, 'graph'):.2f}", f"{exponent(points, 'plan'):.2f}", ""])
    parts += ["## By size of the model, without weights", table(rows)]
    rows = [["", "plain step (s)", *(f"{label} / plain" for label in METHODS.values())]]
    for name, times in data["steps"].items():
        plain = median(each[0] for each in times["plain"])
        rows.append([name, f"{plain:.3f}", *(f"{ratios(times, method, 1)[0]:.3f}" for method in METHODS)])
    parts += ["## A training step (batch 8, 128 tokens; CPU time)", table(rows)]
    return "\n\n".join(parts)


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each thing that grows, on logarithmic axes."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [(SERIES[name][0], points, ("graph", "shrink", "forward pass")) for name, points in data["series"].items()]
    panels.append(("parameters, without weights", by_size(data["shapes"]), ("graph", "plan")))
    for position, (label, points, keys) in enumerate(panels):
        axes = figure.add_subplot(2, 3, position + 1)
        for key, color in zip(keys, COLORS, strict=False):
            name = f"{key} (exponent {exponent(points, key):.2f})"
            axes.loglog(
                [x for x, _ in points], [v[key] for _, v in points], "o-", color=color, markersize=4, label=name
            )
        axes.set_xlabel(label)
        axes.set_ylabel("CPU seconds")
        axes.legend(fontsize=7, frameon=False)
    axes = figure.add_subplot(2, 3, 5)
    for (method, label), color in zip(METHODS.items(), COLORS, strict=False):
        values = [ratios(times, method, 1)[0] for times in data["steps"].values()]
        axes.plot(list(data["steps"]), values, "o-", color=color, markersize=4, label=label)
    axes.axhline(1, color="#24292f", linewidth=0.8, linestyle=":")
    axes.set_ylabel("training step / plain step")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    """Measure, print, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of training steps (default: 6)")
    parser.add_argument("--json", type=Path, help="where measurements go; report and picture go beside it")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    data = {"environment": environment(), **measure(given.rounds)}
    text = report(data)
    print(text)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        plot(data, given.json.with_suffix(".png"))
        about = data["environment"]
        title = "# How costs grow\n\nWritten by `scripts/bench/growth.py`; "
        title += f"{about['cpu']}, torch {about['torch']}, one thread."
        picture = f"![How costs grow]({given.json.with_suffix('.png').name})"
        explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
        page = f"{title}\n\n{picture}\n\n{text}\n\n```\n{explained}```\n"
        given.json.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
