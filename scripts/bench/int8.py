"""How fast an int8 model really is: latency of the ways to run one, timed in turns.

usage: .venv/bin/python scripts/bench/int8.py [--shapes BERT-base MiniLM] [--batch-sizes 1 8 32] [--length 128]
                                              [--threads 1] [--rounds 15] [--json FILE]
       .venv/bin/python scripts/bench/int8.py --readme     only puts a summary of what is stored into README.md
       .venv/bin/python scripts/bench/int8.py --check      only says whether it is there

  fp32 eager, fp32 compiled       the model as it is; with ``torch.compile``
  bf16 eager, bf16 compiled       its weights and activations in bfloat16
  int8 eager, int8 compiled       ``export_quantized(format="torchao")``, loaded again by ``from_pretrained``
  int8 in bf16 compiled           the same of the bfloat16 model: what is no matrix of weights stays in bfloat16
  pruned 75 % + int8 ...          the same after ``shrink`` has removed three of four heads and feed-forward units
  ONNX Runtime fp32, int8         exported by torch; ``quantize_dynamic``, weights per channel
  OpenVINO fp32, int8             converted from that file; ``nncf.quantize`` of OpenVINO's NNCF, on random tokens

Random weights, random tokens, no padding. ``torch.compile`` with constants folded (freezing). Each engine has as many
threads as asked for. Speed-ups are medians over rounds of the ratio to fp32 eager in the same round. What is not
installed is left out, and said so. ``differs`` is the rms of what logits differ by from fp32 eager, relative to theirs
(pruned ones are of another model). Targets where the CPU has VNNI: int8 compiled 4 times as fast as fp32 eager and not
slower than ONNX Runtime's int8; pruned 12 times as fast.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")

import torch
from pruned_models import pruned
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from readme_results import filled  # noqa: E402

from hf_compress import export_quantized  # noqa: E402
from hf_compress.latency.timing import compile_model, median, speedup, time_interleaved  # noqa: E402
from hf_compress.report.environment import environment  # noqa: E402

STORED = ROOT / "model_cards" / "benchmarks" / "int8.json"

SHAPES: dict[str, dict[str, int]] = {
    "BERT-base": {},
    "MiniLM": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96},
}
"""The last is for tests."""

SPARSITY = 0.75
BASE, PEER = "fp32 eager", "ONNX Runtime int8"
OURS = ("int8 compiled", "int8 in bf16 compiled")
PRUNED = ("pruned 75 % + int8 compiled", "pruned 75 % + int8 in bf16 compiled")
TARGETS = {**dict.fromkeys(OURS, 4.0), **dict.fromkeys(PRUNED, 12.0)}
PEERS = {"ONNX Runtime": ("onnx", "onnxruntime", "onnxscript"), "OpenVINO": ("openvino", "nncf", "onnx", "onnxscript")}
"""Engine -> what has to be installed for it."""

Run = Callable[[], Tensor]
Inputs = dict[str, Tensor]


def build(shape: str) -> BertForSequenceClassification:
    """Build the model with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPES[shape])).eval()


def random_inputs(batch_size: int, length: int) -> Inputs:
    """Return texts without padding."""
    ids = torch.randint(1000, 2000, (batch_size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def as_int8(model: BertForSequenceClassification, folder: Path) -> nn.Module:
    """Export a model, and return what loading gives."""
    loaded: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        export_quantized(model, folder, verify=False)
    )
    return loaded.eval()


def missing(engine: str) -> list[str]:
    """Return the packages that an engine lacks here."""
    return [name for name in PEERS[engine] if find_spec(name) is None]


class Ways:
    """The ways to run one model, by name; what cannot be is in ``skipped`` with the reason."""

    def __init__(self, shape: str, batch_sizes: Sequence[int], length: int, threads: int, folder: Path) -> None:
        self.skipped: dict[str, str] = {}
        self._runners: dict[str, Callable[[Inputs], Tensor]] = {}
        self._examples = [random_inputs(batch_size, length) for batch_size in batch_sizes]
        self._threads = threads
        model = build(shape)
        self._add_torch("fp32", model)
        self._add_torch("bf16", build(shape).to(torch.bfloat16))
        self._add_torch("int8", as_int8(model, folder / "int8"))
        self._add_torch("int8 in bf16", as_int8(build(shape).to(torch.bfloat16), folder / "bf16"), eager=False)
        small = pruned(model, SPARSITY)
        self._add_torch("pruned 75 % + int8", as_int8(small, folder / "pruned"), eager=False)
        small = small.to(torch.bfloat16)
        self._add_torch("pruned 75 % + int8 in bf16", as_int8(small, folder / "pruned-bf16"), eager=False)
        self._add_engines(model, folder)

    def on(self, inputs: Inputs) -> dict[str, Run]:
        """Return what to time on one batch."""
        return {name: partial(run, inputs) for name, run in self._runners.items()}

    def _add_torch(self, name: str, model: nn.Module, *, eager: bool = True) -> None:
        if eager:
            self._runners[f"{name} eager"] = partial(_call, model)
        compiled, reason = compile_model(model, self._examples)
        if compiled is None:
            self.skipped[f"{name} compiled"] = str(reason)
        else:
            self._runners[f"{name} compiled"] = partial(_call, compiled)

    def _add_engines(self, model: BertForSequenceClassification, folder: Path) -> None:
        adders = {"ONNX Runtime": self._add_onnx_runtime, "OpenVINO": self._add_openvino}
        for engine, add in adders.items():
            lacks = missing(engine)
            if lacks:
                self.skipped[engine] = f"not installed: {', '.join(lacks)}"
                continue
            if not (folder / "model.onnx").exists():
                to_onnx(model, self._examples[0], folder / "model.onnx")
            add(folder)

    def _add_onnx_runtime(self, folder: Path) -> None:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        integer = folder / "int8.onnx"
        quantize_dynamic(folder / "model.onnx", integer, per_channel=True, weight_type=QuantType.QInt8)
        for name, path in (("fp32", folder / "model.onnx"), ("int8", integer)):
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self._runners[f"ONNX Runtime {name}"] = partial(_call_onnx, session)

    def _add_openvino(self, folder: Path) -> None:
        import nncf
        import openvino

        core = openvino.Core()
        model = core.read_model(folder / "model.onnx")
        batches = [{name: each.numpy() for name, each in inputs.items()} for inputs in self._examples]
        integer = nncf.quantize(model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER)
        settings = {"INFERENCE_NUM_THREADS": self._threads, "INFERENCE_PRECISION_HINT": "f32"}
        for name, each in (("fp32", core.read_model(folder / "model.onnx")), ("int8", integer)):
            compiled = core.compile_model(each, "CPU", settings)
            self._runners[f"OpenVINO {name}"] = partial(_call_openvino, compiled)


def to_onnx(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Export a model by torch, for any number of examples and tokens."""
    batch, tokens = torch.export.Dim("batch", min=1, max=1024), torch.export.Dim("tokens", min=2, max=512)
    shapes = {name: {0: batch, 1: tokens} for name in inputs}
    example = {name: each.repeat(2, 1) if len(each) == 1 else each for name, each in inputs.items()}  # 1 is a constant
    model.config.return_dict = False  # type: ignore[union-attr]
    program = torch.onnx.export(model, (), kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(path))
    model.config.return_dict = True  # type: ignore[union-attr]


def _call(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def _call_onnx(session: Any, inputs: Inputs) -> Tensor:
    return torch.from_numpy(session.run(None, {name: each.numpy() for name, each in inputs.items()})[0])


def _call_openvino(compiled: Any, inputs: Inputs) -> Tensor:
    return torch.from_numpy(compiled({name: each.numpy() for name, each in inputs.items()})[0])


def differences(runs: dict[str, Run]) -> dict[str, float]:
    """Return what the logits of each way differ by from fp32 eager, relative rms."""
    logits = {name: run().double() for name, run in runs.items()}
    expected = logits[BASE]
    return {name: float((each - expected).norm() / expected.norm()) for name, each in logits.items()}


def measure(shape: str, batch_sizes: Sequence[int], length: int, threads: int, rounds: int) -> Iterator[Any]:
    """Time one shape; gives back batch size and what was found, as they come."""
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(shape, batch_sizes, length, threads, Path(folder))
        for batch_size in batch_sizes:
            runs = ways.on(random_inputs(batch_size, length))
            times = time_interleaved(runs, rounds=rounds)
            yield batch_size, {"milliseconds": times, "differs": differences(runs), "skipped": ways.skipped}
    gc.collect()


def table(result: dict[str, Any]) -> str:
    """Return latencies and speed-ups of one shape and batch size as Markdown."""
    times = result["milliseconds"]
    lines = ["|  | ms | faster than fp32 eager | target | differs |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, values in times.items():
        target = f"{TARGETS[name]:g}x" if name in TARGETS else ""
        differs = "-" if name in PRUNED or name == BASE else f"{100 * result['differs'][name]:.1f} %"
        faster = speedup(times[BASE], values)
        lines.append(f"| {name} | {median(values):.2f} | {faster:.2f}x | {target} | {differs} |")
    return "\n".join([*lines, *(f"\n{name}: left out, {reason}." for name, reason in result["skipped"].items())])


def verdicts(result: dict[str, Any]) -> list[str]:
    """Return which targets were reached."""
    times = result["milliseconds"]
    lines = []
    for name, target in TARGETS.items():
        if name in times:
            found = speedup(times[BASE], times[name])
            lines.append(f"- {name}: {found:.2f}x, target {target:g}x {'reached' if found >= target else 'missed'}.")
    for name in OURS:
        if name in times and PEER in times:
            found = speedup(times[PEER], times[name])
            verdict = "reached" if found >= 1 else "missed"
            lines.append(f"- {name}: {found:.2f}x as fast as {PEER}, target 1x {verdict}.")
    return lines


def report(data: dict[str, Any]) -> str:
    """Return what was found, as Markdown."""
    parts = []
    for shape, results in data["results"].items():
        for batch_size, result in results.items():
            parts.append(f"## {shape}, batch {batch_size}, {data['settings']['length']} tokens")
            parts += [table(result), "\n".join(verdicts(result))]
    return "\n\n".join(parts)


def summary(data: Mapping[str, Any]) -> str:
    """Return the lines of README.md: the range of speed-ups over all shapes and batches, and who is ahead how often."""
    found = [result["milliseconds"] for results in data["results"].values() for result in results.values()]
    shapes = " and ".join(data["results"])
    batches = ", ".join(next(iter(data["results"].values())))
    lines = ["| way to run it | faster than fp32 eager | ahead of int8 compiled |", "| --- | ---: | ---: |"]
    for name in (OURS[0], PRUNED[0], "ONNX Runtime int8", "OpenVINO int8"):
        runs = [times for times in found if name in times]
        if runs:
            faster = [speedup(times[BASE], times[name]) for times in runs]
            ahead = sum(speedup(times[OURS[0]], times[name]) > 1 for times in runs)
            beside = "-" if name in (OURS[0], PRUNED[0]) else f"{ahead} of {len(runs)}"
            lines.append(f"| {name} | {min(faster):.1f}x to {max(faster):.1f}x | {beside} |")
    about = data["environment"]
    where = (
        f"{shapes} with batches of {batches} texts of {data['settings']['length']} tokens, {about['threads']} thread(s)"
    )
    return "\n".join([f"{where} of an {about['cpu']}:", "", *lines])


def readme(*, check: bool) -> None:
    """Put the summary into README.md, or exit with an error if it is not there."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(
        text, summary(json.loads(STORED.read_text(encoding="utf-8"))), "<!-- int8:start -->", "<!-- int8:end -->"
    )
    if check and new != text:
        sys.exit(f"README.md: the summary differs from {STORED}; run scripts/bench/int8.py --readme")
    path.write_text(new, encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of the engines."""
    found = {}
    for name in ("onnx", "onnxruntime", "openvino", "nncf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def has_vnni() -> bool | None:
    """Return whether the CPU multiplies int8 in one instruction; None where the system does not say."""
    path = Path("/proc/cpuinfo")
    return ("vnni" in path.read_text(encoding="utf-8")) if path.exists() else None


def write(data: dict[str, Any], path: Path) -> None:
    """Write the measurements, and the report beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    about = data["environment"]
    vnni = {True: "with VNNI", False: "without VNNI", None: "VNNI unknown"}[data["vnni"]]
    engines = "".join(f", {name} {number}" for name, number in data["versions"].items())
    title = "# How fast an int8 model is\n\nWritten by `scripts/bench/int8.py`; "
    title += f"{about['cpu']} {vnni}, {about['threads']} thread(s), torch {about['torch']}, torchao "
    title += f"{about.get('torchao', 'none')}, transformers {about['transformers']}{engines}."
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    path.with_suffix(".md").write_text(f"{title}\n\n{report(data)}\n\n```\n{explained}```\n", encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["BERT-base", "MiniLM"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens per example (default: 128)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every engine (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--json", type=Path, help="file to write all measurements to; the report goes beside it as .md")
    parser.add_argument("--readme", action="store_true", help="only put the summary into README.md")
    parser.add_argument("--check", action="store_true", help="only compare README.md with the results")
    given = parser.parse_args()
    if given.readme or given.check:
        readme(check=given.check)
        return
    if min(*given.batch_sizes, given.length, given.threads, given.rounds) < 1:
        parser.error("counts must be at least 1")
    torch.set_num_threads(given.threads)
    # Every model and batch compiles the same code anew; beyond the limit it would run eagerly, in silence.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    settings = {name: value for name, value in vars(given).items() if name not in ("json", "readme", "check")}
    data: dict[str, Any] = {"environment": environment(), "versions": versions(), "vnni": has_vnni()}
    data |= {"settings": settings, "results": {}}
    for shape in given.shapes:
        results = data["results"].setdefault(shape, {})
        for batch_size, found in measure(shape, given.batch_sizes, given.length, given.threads, given.rounds):
            results[str(batch_size)] = found
            if given.json:  # after each: what was measured should not be lost
                write(data, given.json)
    print(report(data))


if __name__ == "__main__":
    main()
