"""What the callbacks cost: time and memory of a training step, beside the plain Trainer.

usage: .venv/bin/python scripts/bench/overhead.py [--rounds 6] [--small-rounds 40] [--threads 1] [--workers 1]
                                                  [--shapes small BERT-base] [--json FILE]

Time. One real Trainer for each method, in one process; their steps take turns, in another order each round, so that
a noisy machine is noisy for all. A step is everything from the Trainer's ``on_step_begin`` to its ``on_step_end``,
events of the callbacks included: forward, backward, clipping, AdamW. Reported is the median over rounds of the ratio
to the plain Trainer's step of the same round, with the quartiles. Targets refer to CPU time, which other processes
disturb less; wall time stands beside it. Where there is a GPU, steps run on it, and targets refer to wall time.
  gates          ``PruningCallback``, criterion taylor, all heads and feed-forward units, cubic schedule up to half
  weight masks   ``ElementMask`` on all Linear layers of the encoder, half of the weights
  int8 QAT       ``QuantizationCallback``, int8_dynamic: weights and inputs of all layers
  distillation   ``DistillationCallback``, a teacher of the same shape; beside a plain step + the teacher's forward pass
  cached teacher the same, the teacher's answers looked up in a ``TeacherCache``; beside a plain step

Memory. One process for each method, the third step:
  steady         bytes of all tensors between two steps
  kept           bytes that the forward pass keeps for the backward pass, besides what there was before
  peak           most bytes of tensors held at once within the step, as the profiler records them
  instruments    bytes of the masks, gates and scores themselves: what a method may hold beyond the plain Trainer
The target refers to the peak: no more than the instruments, and 1 % of the plain peak for what one layer makes again
in passing. Tensors are counted, not what the allocator reserves for them.

Random weights, random tokens, no padding, dropout on.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from hf_compress.report.environment import environment

WORK = Path(__file__).with_name("overhead_work.py")
MAX_RATIO = {"gates": 1.03, "weight masks": 1.10, "int8 QAT": 1.15, "distillation": 1.05, "cached teacher": 1.05}
TIMED = {"BERT-base": "BERT-base, batch 8, 128 tokens", "small": "4 layers, width 256, batch 16, 64 tokens"}
PEAK_TOLERANCE = 0.01
"""Part of the plain peak: scales, factors, and one layer's weight or input while it is made again."""

Times = dict[str, list[list[float]]]
"""By method, wall and CPU seconds of each round."""

Memory = dict[str, dict[str, int]]
"""By method, bytes."""


def run(kind: str, shape: str, what: str, threads: int) -> Any:
    """Do one measurement in a new process."""
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        # Threads that take turns would each get an arena of malloc's own, with other habits than that of a program
        # with one Trainer; and the number of threads of an operator is inherited from here alone.
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    command = [sys.executable, str(WORK), kind, shape, what, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {kind} of {shape}, {what}, failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(times: Times, method: str, clock: int) -> tuple[float, float, float]:
    """Return median, lower and upper quartile of a method's step / the plain step; clock 0 is wall, 1 is CPU time."""
    base = [each[clock] for each in times["plain"]]
    if method == "distillation":
        base = [own + teacher[clock] for own, teacher in zip(base, times["teacher forward"], strict=True)]
    found = [each[clock] / plain for each, plain in zip(times[method], base, strict=True)]
    low, _, high = quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return median(found), low, high


def within(memory: Memory, method: str) -> bool:
    """Return whether the peak rises by no more than what the method's masks and gates hold themselves."""
    return beyond(memory, method) <= PEAK_TOLERANCE * memory["plain"]["peak"]


def beyond(memory: Memory, method: str) -> int:
    """Return the bytes of the peak beyond the plain peak and the method's instruments."""
    return memory[method]["peak"] - memory["plain"]["peak"] - memory[method]["instruments"]


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time_table(times: Times, on_gpu: bool) -> str:
    """Return what a step takes with each method."""
    rows = [["", "step (s)", "CPU time / plain", "quartiles", "wall time / plain", "quartiles", "target", ""]]
    for name, rounds in times.items():
        row = [name, f"{median(each[0] for each in rounds):.3f}"]
        if name in MAX_RATIO:
            cpu, wall = ratios(times, name, 1), ratios(times, name, 0)
            for middle, low, high in (cpu, wall):
                row += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
            decisive = wall if on_gpu else cpu
            row += [f"{MAX_RATIO[name]:.2f}", "reached" if decisive[0] <= MAX_RATIO[name] else "missed"]
        rows.append(row + [""] * (8 - len(row)))
    return table(rows)


def memory_table(memory: Memory) -> str:
    """Return what each method holds."""
    kinds = ("steady", "kept for backward", "peak")
    rows = [["MiB beyond plain", *kinds, "instruments", "peak beyond both", ""]]
    rows.append(["plain (all)", *(f"{memory['plain'][kind] / 2**20:.1f}" for kind in kinds), "", "", ""])
    for name in memory:
        if name != "plain":
            more = [(memory[name][kind] - memory["plain"][kind]) / 2**20 for kind in kinds]
            row = [name, *(f"{each:+.1f}" for each in more), f"{memory[name]['instruments'] / 2**20:.1f}"]
            verdict = "reached" if within(memory, name) else "missed"
            # Its teacher is no instrument, and there is no way around holding it.
            row += ["the teacher", ""] if name == "distillation" else [f"{beyond(memory, name) / 2**20:+.1f}", verdict]
            rows.append(row)
    return table(rows)


def report(times: dict[str, Times], memory: dict[str, Memory], on_gpu: bool) -> str:
    """Return everything that is printed at the end."""
    parts = []
    for shape in times:
        rounds = len(times[shape]["plain"])
        parts += [f"## {TIMED.get(shape, shape)}", f"{rounds} rounds", time_table(times[shape], on_gpu)]
        parts += [memory_table(memory[shape])]
    return "\n\n".join(parts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of BERT-base (default: 6)")
    parser.add_argument("--small-rounds", type=int, default=40, help="of the small model (default: 40)")
    parser.add_argument("--shapes", nargs="+", choices=TIMED, default=["small", "BERT-base"], help="(default: both)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="measurements of memory side by side (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write all measurements to; the report goes beside it as .md")
    given = parser.parse_args()
    if min(given.rounds, given.small_rounds, given.threads, given.workers) < 1:
        parser.error("--rounds, --small-rounds, --threads and --workers must be at least 1")
    times: dict[str, Times] = {}
    memory: dict[str, Memory] = {}
    for shape in given.shapes:
        rounds = given.small_rounds if shape == "small" else given.rounds
        print(f"{shape}: time, then memory", file=sys.stderr)
        times[shape] = run("time", shape, str(rounds), given.threads)
        methods = ("plain", *MAX_RATIO)
        with ThreadPoolExecutor(given.workers) as pool:
            found = pool.map(partial(run, "memory", shape, threads=given.threads), methods)
            memory[shape] = dict(zip(methods, found, strict=True))
    about = {**environment(), "threads": str(given.threads)}
    text = report(times, memory, about["gpu"] != "none")
    print(text)
    if given.json:
        data = {"environment": about, "times": times, "memory": memory}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        title = "# What the callbacks cost\n\nWritten by `scripts/bench/overhead.py`; "
        title += f"{about['cpu'] if about['gpu'] == 'none' else about['gpu']}, one process,"
        title += f" {given.threads} thread(s) of torch {about['torch']}."
        explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
        given.json.with_suffix(".md").write_text(f"{title}\n\n{text}\n\n```\n{explained}```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
