"""How fast pruned, int8 and 2:4 models are on a GPU: latency in bfloat16, timed in turns.

usage: .venv/bin/python scripts/bench/gpu.py [--shapes BERT-base Llama-1B] [--rounds 15] [--json FILE]

  fp32, bf16        the dense model
  pruned 50 % ...   ``shrink`` has removed so many of the heads and feed-forward units of every layer; bfloat16
  2:4               ``prune_oneshot(granularity="2:4")`` leaves two of four neighbouring weights, and the matrices are
                    stored as torch's semi-structured sparse tensors, for the sparse units of the GPU
  int8              ``export_quantized(format="torchao")`` of the bfloat16 model, loaded again: int8 weights and inputs
  pruned 75 % int8  both

Each is run eagerly and, where it says so, compiled by ``torch.compile``; each again as a CUDA graph, which leaves the
GPU's own time: small batches of eager models wait for Python. Random weights, random tokens, no padding. Speed-ups are
medians over rounds of the ratio to ``bf16``, run in the same way, in the same round. ``differs`` is the rms of what
logits differ by from those of fp32, relative to theirs (2:4 and pruned ones are other models). Without a GPU the same
runs, CUDA graphs and 2:4 left out; that is for tests.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pruned_models import pruned
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_compress import PruningConfig, export_quantized, prune_oneshot
from hf_compress.latency.timing import compile_model, median, speedup, time_interleaved
from hf_compress.report.environment import environment


@dataclass(frozen=True)
class Shape:
    """A model, and the batches that it is run on."""

    build: Callable[[], PreTrainedModel]
    tokens: int
    batch_sizes: tuple[int, ...]


def bert(**sizes: int) -> PreTrainedModel:
    """Build BERT, by default of the base size."""
    return BertForSequenceClassification(BertConfig(**sizes))


def llama() -> PreTrainedModel:
    """Build a decoder of the size of Llama-3.2-1B, with fewer words."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


SHAPES = {
    "BERT-base": Shape(bert, 128, (1, 32)),
    "Llama-1B": Shape(llama, 512, (8,)),
    "tiny": Shape(
        partial(bert, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=96), 8, (1,)
    ),
}
"""The last is for tests."""

PRUNED = (0.5, 0.75, 0.9)
FEW_ROWS = ("pooler", "classifier")
"""Layers that see one token of each example."""

COMPILED = ("bf16", "pruned 75 %", "2:4", "int8", "pruned 75 % int8")
EAGER = ("fp32", "bf16", *(f"pruned {round(100 * each)} %" for each in PRUNED), "2:4")
"""Int8 in eager mode is for no use: every step of it is a kernel of its own."""

WAYS = ("eager", "compiled", "eager, CUDA graph", "compiled, CUDA graph")
BASE, EXACT = "bf16", "fp32"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Run = Callable[[], Tensor]
Inputs = dict[str, Tensor]
Skipped = dict[str, str]


def build(shape: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Build the model with random weights, the same for all types of number."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return SHAPES[shape].build().eval().to(dtype)


def random_inputs(shape: str, batch_size: int) -> Inputs:
    """Return texts without padding."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(1000, 2000, (batch_size, SHAPES[shape].tokens), generator=generator).to(DEVICE)}


def two_of_four(model: PreTrainedModel, inputs: Inputs) -> PreTrainedModel:
    """Leave two of four neighbouring weights of every layer, and store its matrices as semi-structured tensors."""
    config = PruningConfig(structures={"weights": 0.5}, criterion="level", granularity="2:4")
    parameters = dict(model.named_parameters())
    for name in halved(prune_oneshot(model, [inputs], config).weight_masks):
        owner, _, last = name.rpartition(".")
        sparse = torch.sparse.to_sparse_semi_structured(parameters[name].detach())
        setattr(model.get_submodule(owner), last, nn.Parameter(sparse, requires_grad=False))
    return model


def halved(masks: Mapping[str, Tensor]) -> list[str]:
    """Return the matrices that a GPU's sparse units take, by name.

    Raises:
        RuntimeError: If there are none.
    """
    found = [name for name, mask in masks.items() if all(size % 64 == 0 for size in mask.shape)]
    if not found:
        raise RuntimeError("no matrix has sizes that the sparse units of a GPU take: multiples of 64")
    return found


def as_int8(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Export a model, and return what loading gives.

    The layers behind the first token stay as they are: torch multiplies int8 matrices of more than 16 rows on a GPU.
    """
    exclude = FEW_ROWS if isinstance(model, BertForSequenceClassification) else None
    export_quantized(model, folder, verify=False, exclude=exclude)
    loaded: PreTrainedModel = type(model).from_pretrained(folder)
    return loaded.eval().to(DEVICE)


def models(shape: str, inputs: Inputs, folder: Path) -> Iterator[tuple[str, PreTrainedModel | str]]:
    """Give every model under its name, or the reason why there is none; one at a time, as they need memory."""
    yield EXACT, build(shape, torch.float32)
    yield BASE, build(shape)
    for sparsity in PRUNED:
        yield f"pruned {round(100 * sparsity)} %", pruned(build(shape), sparsity)
    if DEVICE == "cpu":
        yield "2:4", "needs a GPU"
    else:
        yield "2:4", two_of_four(build(shape), inputs)
    yield "int8", as_int8(build(shape), folder / "int8")
    yield "pruned 75 % int8", as_int8(pruned(build(shape), 0.75), folder / "pruned")


def graphed(run: Run) -> Run:
    """Return what replays the kernels of a run, whose inputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def runs_of(name: str, model: PreTrainedModel, inputs: Inputs, skipped: Skipped) -> dict[str, Run]:
    """Return the ways to run a model, as "NAME WAY"."""
    found: dict[str, Run] = {}
    if name in EAGER:
        found[f"{name} eager"] = partial(_call, model, inputs)
    if name in COMPILED:
        compiled, reason = compile_model(model, [inputs])
        if compiled is None:
            skipped[f"{name} compiled"] = str(reason)
        else:
            found[f"{name} compiled"] = partial(_call, compiled, inputs)
    if DEVICE == "cpu":
        return found
    for way, run in list(found.items()):
        try:
            found[f"{way}, CUDA graph"] = graphed(run)
        except RuntimeError as error:  # something in it waits for the GPU
            skipped[f"{way}, CUDA graph"] = str(error).splitlines()[0]
    return found


def _call(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def measure(shape: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time one shape with one batch size."""
    torch.compiler.reset()
    inputs, skipped = random_inputs(shape, batch_size), Skipped()
    runs: dict[str, Run] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models(shape, inputs, Path(folder)):
            if isinstance(model, str):
                skipped[name] = model
                continue
            runs |= runs_of(name, model, inputs, skipped)
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        times = time_interleaved(runs, rounds=rounds)
        logits = {name: run().double() for name, run in runs.items()}
    exact = logits[f"{EXACT} eager"]
    differs = {name: float((each - exact).norm() / exact.norm()) for name, each in logits.items()}
    return {"milliseconds": times, "differs": differs, "parameters": sizes, "skipped": skipped}


def table(result: Mapping[str, Any]) -> str:
    """Return latencies and speed-ups of one shape and batch size as Markdown, a line for every model."""
    times: dict[str, list[float]] = result["milliseconds"]
    ways = [way for way in WAYS if f"{BASE} {way}" in times]
    head = ["", "parameters", *(text for way in ways for text in (f"{way}, ms", "faster")), "differs"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, size in result["parameters"].items():
        cells = [name, f"{size / 1e6:.1f} M"]
        for way in ways:
            own, base = times.get(f"{name} {way}"), times[f"{BASE} {way}"]
            cells += ["-", "-"] if own is None else [f"{median(own):.3f}", f"{speedup(base, own):.2f}x"]
        other_model = "pruned" in name or name in (EXACT, "2:4")
        found = [value for key, value in result["differs"].items() if key.startswith(f"{name} ")]
        lines.append([*cells, "-" if other_model or not found else f"{100 * max(found):.1f} %"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(data: Mapping[str, Any]) -> str:
    """Return what was found, as Markdown."""
    parts = []
    for shape, results in data["results"].items():
        for batch_size, result in results.items():
            parts += [f"## {shape}, batch {batch_size}, {SHAPES[shape].tokens} tokens", table(result)]
            parts += [f"{name}: left out, {reason}." for name, reason in result["skipped"].items()]
    return "\n\n".join(parts)


def write(data: Mapping[str, Any], path: Path) -> None:
    """Write the measurements, and the report beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    about = data["environment"]
    device = about["cpu"] if about["gpu"] == "none" else about["gpu"]
    title = f"# How fast compressed models are on a GPU\n\nWritten by `scripts/bench/gpu.py`; {device}, torch "
    title += f"{about['torch']}, torchao {about.get('torchao', 'none')}, transformers {about['transformers']}, "
    title += f"{data['settings']['rounds']} rounds."
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    path.with_suffix(".md").write_text(f"{title}\n\n{report(data)}\n\n```\n{explained}```\n", encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["BERT-base", "Llama-1B"])
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--json", type=Path, help="file to write all measurements to; the report goes beside it as .md")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    # Every model compiles the same code anew; beyond the limit it would run eagerly, in silence.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    data: dict[str, Any] = {"environment": environment(), "settings": settings, "results": {}}
    for shape in given.shapes:
        results = data["results"].setdefault(shape, {})
        for batch_size in SHAPES[shape].batch_sizes:
            results[str(batch_size)] = measure(shape, batch_size, given.rounds)
            if given.json:  # after each: what was measured should not be lost
                write(data, given.json)
    print(report(data))


if __name__ == "__main__":
    main()
