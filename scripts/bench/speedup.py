"""Whether a speed-up that is asked for is the one that is measured, and how far the table of latencies can be trusted.

usage: .venv/bin/python scripts/bench/speedup.py [--target 3] [--batch-sizes 1 8] [--length 128] [--threads 1]
                                                 [--multiple-of 8] [--rounds 15] [--shape BERT-base] [--json FILE]

For each batch size, on this machine:
  table     ``measure_latency``: every number of heads, widths of the feed-forward parts in geometric steps, and some
            whole models. How long that took is reported.
  expected  ``masks_within_latency`` chooses masks for several speed-ups. Each is cut out of the model and timed in
  measured  turns with the dense one. The error is measured / expected - 1; at most 10 % is the target.
  fitted    ``fit_speedup``: masks, measurement, correction of the table, again; the model that comes out is verified
            and measured once more. Within 10 % of the speed-up that was asked for is the target.

Random weights, random tokens, no padding; scores are random, in proportion to the weights of a unit, and of another
mean in every layer, so that layers keep different sizes. Speed-ups are medians over rounds of the ratio of times of
the same round. The load of the machine stands beside it: other work disturbs what is measured.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from hf_compress.errors import TargetError
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.limits import group_limits
from hf_compress.latency.masks import fit_speedup, masks_within_latency, measure_speedup
from hf_compress.latency.measure import Timer, measure_latency, shrunk_copy, time_in_turns
from hf_compress.latency.table import LatencyTable
from hf_compress.report.environment import environment

MAX_ERROR = 0.1
CHECKED = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Speed-ups of the whole models that the table is checked with."""

SHAPES: dict[str, dict[str, int]] = {
    "BERT-base": {},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96},
}
"""The last is for tests."""

Result = dict[str, Any]


def build(shape: str) -> BertForSequenceClassification:
    """Build the model with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPES[shape])).eval()


def random_inputs(batch_size: int, length: int) -> dict[str, Tensor]:
    """Return texts without padding."""
    ids = torch.randint(1000, 2000, (batch_size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_scores(graph: ModelGraph, seed: int) -> dict[str, Tensor]:
    """Return scores of all heads and feed-forward units."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for group in graph.groups:
        if group.kind in ("heads", "ffn"):
            layer = 0.5 + torch.rand(1, generator=generator)
            scores[group.name] = layer * group.parameters_per_unit * torch.rand(group.num_units, generator=generator)
    return scores


def measure(
    model: BertForSequenceClassification,
    inputs: Mapping[str, Tensor],
    *,
    target: float,
    multiple_of: int,
    rounds: int,
    timer: Timer = time_in_turns,
) -> Result:
    """Measure a table, check it, and fit a speed-up."""
    graph = ModelGraph(model, inputs)
    start = time.perf_counter()
    table = measure_latency(model, inputs, multiple_of=multiple_of, graph=graph, timer=timer)
    took = time.perf_counter() - start
    scores = random_scores(graph, seed=0)
    limits = group_limits([group for group in graph.groups if group.name in scores], multiple_of=multiple_of)
    checked = []
    for number, asked in enumerate(CHECKED):
        masks = masks_within_latency(table, random_scores(graph, number + 1), limits, table.predict({}) / asked)
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        dense, small = shrunk_copy(model, graph, {}), shrunk_copy(model, graph, kept)
        found = measure_speedup(dense, small, inputs, rounds=rounds, timer=timer)
        checked.append([table.predict({}) / table.predict(kept), found.ratio])
    fitted: Result
    try:
        fit = fit_speedup(
            model, scores, target, example_inputs=inputs, limits=limits, table=table, rounds=rounds, timer=timer
        )
        fitted = {"measured": fit.measured.ratio, "seconds": fit.measured.seconds, "tried": fit.tried}
        fitted["parameters"] = [model.num_parameters(), fit.model.num_parameters()]
    except TargetError as error:
        fitted = {"error": str(error)}
    return {"table": json.loads(table.to_json()), "table seconds": took, "checked": checked, "fitted": fitted}


def verdict(expected: float, measured: float) -> str:
    """Return the error and whether it is within the target."""
    error = measured / expected - 1
    return f"{error:+.1%}, {'reached' if abs(round(error, 4)) <= MAX_ERROR else 'missed'}"


def report(result: Result, target: float) -> str:
    """Return what was found for one batch size."""
    table = LatencyTable.from_json(json.dumps(result["table"]))
    sizes = sum(len(curve.kept) - 1 for curve in table.curves) + len(table.totals)
    lines = [
        f"Table: {sizes} sizes in {result['table seconds']:.0f} s; {table.predict({}) * 1000:.1f} ms dense, "
        f"{table.base * 1000:.1f} ms without heads and feed-forward units.",
        "",
        "| expected | measured | error |",
        "| ---: | ---: | ---: |",
    ]
    lines += [f"| {expected:.2f} | {found:.2f} | {verdict(expected, found)} |" for expected, found in result["checked"]]
    fitted = result["fitted"]
    if "error" in fitted:
        return "\n".join([*lines, "", f"Asked for {target:g} times as fast: missed. {fitted['error']}"])
    tried = ", then ".join(f"{found:.2f}" for _, found in fitted["tried"])
    before, after = fitted["parameters"]
    dense, small = (f"{seconds * 1000:.1f} ms" for seconds in fitted["seconds"])
    lines += [
        "",
        f"Asked for {target:g} times as fast; measured on the way {tried}; measured in the end "
        f"**{fitted['measured']:.2f}** ({verdict(target, fitted['measured'])}): {dense} to {small}, "
        f"{before / 1e6:.1f} M to {after / 1e6:.1f} M parameters.",
    ]
    return "\n".join(lines)


def load_average() -> list[float]:
    """Return the runnable processes of the last 1, 5 and 15 minutes; nothing where the system does not count them."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def main(arguments: Sequence[str] | None = None, timer: Timer = time_in_turns) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=3.0, help="speed-up to fit (default: 3)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="(default: 1)")
    parser.add_argument("--length", type=int, default=128, help="tokens per example (default: 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--multiple-of", type=int, default=8, help="of widths that are kept (default: 8)")
    parser.add_argument("--rounds", type=int, default=15, help="of each speed-up (default: 15)")
    parser.add_argument("--shape", choices=SHAPES, default="BERT-base", help="(default: BERT-base)")
    parser.add_argument("--json", type=Path, help="file to write all measurements to; the report goes beside it as .md")
    given = parser.parse_args(arguments)
    if min(*given.batch_sizes, given.length, given.threads, given.multiple_of, given.rounds) < 1 or given.target <= 1:
        parser.error("counts must be at least 1, and --target more")
    torch.set_num_threads(given.threads)
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    data: Result = {"environment": environment(), "settings": settings, "load average": [load_average()], "results": {}}
    for batch_size in given.batch_sizes:
        data["results"][str(batch_size)] = measure(
            build(given.shape),
            random_inputs(batch_size, given.length),
            target=given.target,
            multiple_of=given.multiple_of,
            rounds=given.rounds,
            timer=timer,
        )
        data["load average"].append(load_average())
        if given.json:  # after every batch size: what was measured should not be lost
            write(data, given.json)
    print(report_all(data))


def report_all(data: Result) -> str:
    """Return what was found for all batch sizes, under the conditions in which it was found."""
    settings = data["settings"]
    loads = ", ".join(str(loads[0]) for loads in data["load average"] if loads)
    parts = [f"Load of the machine before and after each batch size, this benchmark included: {loads}."]
    for batch_size, result in data["results"].items():
        title = f"## {settings['shape']}, batch {batch_size}, {settings['length']} tokens"
        parts += [title, report(result, settings["target"])]
    return "\n\n".join(parts)


def write(data: Result, path: Path) -> None:
    """Write the measurements, and the report beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    about = data["environment"]
    title = "# Asked for a speed-up, measured a speed-up\n\nWritten by `scripts/bench/speedup.py`; "
    title += f"{about['cpu']}, {about['threads']} thread(s) of torch {about['torch']}."
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    text = f"{title}\n\n{report_all(data)}\n\n```\n{explained}```\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
