"""How long it takes to find out what belongs together in a model and to cut it, beside Torch-Pruning.

usage: .venv/bin/python scripts/bench/graph.py [--rounds 5] [--threads 1] [--json FILE]

Every measurement is a process of its own, and all take turns: a noisy machine is noisy for all. Medians are printed:
wall time, and CPU time below it, which other processes disturb less. Libraries are imported and the model is built
before the clock starts. *First* is the first time in the process, with all that torch sets up lazily; *again* is the
median of three more times, each on a newly built model.

BERT-base, random weights, real tensors; every second head and every second feed-forward unit of each layer goes.
  hf_compress    ``plan_shrink`` and ``slice_in_place``, which are ``shrink`` without the copy and the verification:
                 capture (the recorded forward pass), analysis (dimension groups), plan (which positions stay, which
                 attributes change), apply (slicing).
  torch-pruning  ``DependencyGraph.build_dependency`` on the same inputs, then ``get_pruning_group`` (plan) and
                 ``prune`` (apply) for each layer. This is the least that it has to do: units are given, as they are
                 above, so no importance is computed.
  pruner         torch-pruning's ``BasePruner`` with ``num_heads``, which its documentation recommends: it also lists
                 all groups and computes magnitudes to choose units by. For comparison only; no target refers to it.
That the first two cut the same is checked: parameters and outputs must be equal.

Llama-3-8B, its shapes alone, on the meta device: capture, analysis and plan of the same kind; peak memory is that of
the process, libraries included.

Torch-Pruning is installed into .cache/bench-torch-pruning, which shares every other package with this environment;
without network it is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from statistics import median
from typing import Any

from hf_compress.report.environment import environment

ROOT = Path(__file__).resolve().parents[2]
OTHER_ENV = ROOT / ".cache" / "bench-torch-pruning"
OTHER = "torch-pruning==1.6.1"
TOLERANCE = 1e-5

MAX_BERT_SECONDS, MAX_LLAMA_SECONDS, MAX_LLAMA_GB, MIN_RATIO = 1, 20, 2, 4

Results = dict[str, list[dict[str, Any]]]
"""By what was measured, one entry a round."""

PHASES = ("capture", "analysis", "graph", "plan", "apply", "plan and apply", "all", "CPU time")


def run(python: Path, name: str, threads: int) -> dict[str, Any]:
    """Do one measurement in a new process."""
    command = [str(python), str(Path(__file__).with_name("graph_work.py")), name, str(threads)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    if done.returncode != 0:
        sys.exit(f"error: the measurement of {name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def install_other() -> tuple[Path | None, str]:
    """Make the environment of Torch-Pruning; return its Python, or None and the reason."""
    python = OTHER_ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    commands = [
        [sys.executable, "-m", "venv", "--without-pip", str(OTHER_ENV)],
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", OTHER],
    ]
    try:
        for command in commands:
            subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        # All else, torch above all, comes from the environment that runs this script: the same for both.
        shared = sysconfig.get_paths()["purelib"]
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        (Path(site) / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
        subprocess.run([str(python), "-c", "import torch_pruning"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return None, reason[-1] if reason else str(error)
    return python, ""


def check_equal(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """End with an error unless both cut the same."""
    difference = max(abs(a - b) for a, b in zip(ours["logits"], other["logits"], strict=True))
    if ours["parameters"] != other["parameters"] or difference > TOLERANCE:
        sys.exit(
            f"error: not the same work: {ours['parameters']} and {other['parameters']} parameters, outputs differ by "
            f"{difference:.1e}"
        )


def table(results: Results) -> str:
    """Return the medians as lines of text."""
    rows = [["", *results]]
    for when in ("first", "again"):
        for phase in PHASES:
            cells = [[found[when].get(phase) for found in rounds] for rounds in results.values()]
            if any(values[0] is not None for values in cells):
                rows.append(
                    [f"{when}, {phase}", *("-" if v[0] is None else f"{median(v) * 1000:.0f} ms" for v in cells)]
                )
    for label, key in (("peak memory", "peak_memory"), ("  before the clock started", "memory_before")):
        rows.append([label, *(f"{median(f[key] for f in r) / 2**20:.0f} MiB" for r in results.values())])
    rows.append(["parameters after", *(f"{r[0]['parameters'][1]:,}" for r in results.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for label, *numbers in rows:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def ratio(results: Results, other: str, when: str, phase: str) -> float:
    """Return the median over rounds of the other's time / our time."""
    pairs = zip(results["hf_compress"], results[other], strict=True)
    return median(theirs[when][phase] / mine[when][phase] for mine, theirs in pairs)


def verdicts(results: Results) -> dict[str, tuple[float, bool | None]]:
    """Return by name what came out, and whether the target was reached; None where there is none."""
    bert_all = median(found["first"]["all"] for found in results["hf_compress"])
    llama_all = median(found["first"]["all"] for found in results["llama"])
    llama_memory = max(found["peak_memory"] for found in results["llama"]) / 1e9
    found: dict[str, tuple[float, bool | None]] = {
        f"BERT-base: seconds, at most {MAX_BERT_SECONDS}": (bert_all, bert_all <= MAX_BERT_SECONDS),
        f"Llama-3-8B: seconds, at most {MAX_LLAMA_SECONDS}": (llama_all, llama_all <= MAX_LLAMA_SECONDS),
        f"Llama-3-8B: GB of memory, at most {MAX_LLAMA_GB}": (llama_memory, llama_memory <= MAX_LLAMA_GB),
    }
    for other in ("torch-pruning", "pruner"):
        for when in ("first", "again") if other in results else ():
            times = ratio(results, other, when, "all")
            wanted = f", at least {MIN_RATIO}" if other == "torch-pruning" else ""
            found[f"{other} / hf_compress, {when}: times{wanted}"] = (times, times >= MIN_RATIO if wanted else None)
            found[f"{other} / hf_compress, {when}, CPU time: times"] = (ratio(results, other, when, "CPU time"), None)
    return found


def report(results: Results, reached: dict[str, tuple[float, bool | None]]) -> str:
    """Return everything that is printed at the end."""
    berts = {name: rounds for name, rounds in results.items() if name != "llama"}
    lines = [
        "BERT-base, half of the heads and feed-forward units",
        table(berts),
        "",
        "Llama-3-8B without weights, half of the heads and feed-forward units",
        table({"hf_compress": results["llama"]}),
        "",
    ]
    outcomes = {None: "", True: " (reached)", False: " (missed)"}
    lines += [f"{name}: {value:.2f}{outcomes[met]}" for name, (value, met) in reached.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write all measurements to; the report goes beside it as .md")
    given = parser.parse_args()
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    python, reason = install_other()
    if python is None:
        print(f"without {OTHER}, which could not be installed: {reason}")
    own = Path(sys.executable)
    pythons = {"hf_compress": own, "torch-pruning": python, "pruner": python, "llama": own}
    pythons = {name: interpreter for name, interpreter in pythons.items() if interpreter is not None}
    results: Results = {name: [] for name in pythons}
    for number in range(given.rounds):
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
        for name, interpreter in pythons.items():
            results[name].append(run(interpreter, name, given.threads))
        if "torch-pruning" in results:
            check_equal(results["hf_compress"][-1], results["torch-pruning"][-1])
    reached = verdicts(results)
    text = f"medians of {given.rounds} rounds, {given.threads} threads, {environment()['cpu']}\n\n"
    text += report(results, reached)
    print(text)
    if given.json:
        data = {"environment": environment(), "threads": given.threads, "results": results, "targets": reached}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        title = "# Graph, plan and shrink beside Torch-Pruning\n\nWritten by `scripts/bench/graph.py`."
        given.json.with_suffix(".md").write_text(f"{title}\n\n```\n{text}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
