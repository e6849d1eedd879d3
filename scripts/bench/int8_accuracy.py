"""What quantization costs in accuracy: MiniLM on movie reviews, without training and with it.

usage: .venv/bin/python scripts/bench/int8_accuracy.py --json FILE [--task movies] [--seeds 0 1 2] [--dense-steps 600]
           [--steps 150] [--only NAME ...]

For each seed MiniLM is fine-tuned (``fp32``), and from that model come
  fp32, trained on        as many steps more as quantization-aware training gets, in floating point
  torchao PTQ int8        torchao's own ``quantize_``, int8 weights per channel and dynamic int8 inputs per token
  PTQ ...                 ``calibrate``: int8 dynamic, int8 with observed input ranges, 4-bit weights in groups of 32,
                          to nearest and by GPTQ; 8 batches of training data where data are needed
  QAT / LSQ ...           ``QuantizationCallback`` for a few steps at a tenth of the learning rate; 4-bit weights per
                          channel, inputs int8 dynamic
Rows named int8 dynamic are measured on the exported model, loaded again, with torchao's integer kernel; others with
fake quantization. ``cost`` is the mean over seeds of fp32 - this, in points, on the same test examples. Targets: PTQ
int8 0.5 points, QAT and LSQ int8 0.2, LSQ with 4-bit weights 1.5. Results are kept in the JSON file as they come, and a
run that is stopped goes on where it was.
"""

import argparse
import copy
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from methods_work import TASKS, Settings, accuracy, batches_of, pretrained, trainer_of  # noqa: E402
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed  # noqa: E402

from hf_compress import QuantizationCallback, QuantizationConfig, calibrate, export_quantized  # noqa: E402
from hf_compress.report.environment import environment  # noqa: E402

FP32 = "fp32"
CALIBRATION_BATCHES = 8
WEIGHTS4 = {"num_bits": 4}


def ptq(**settings: Any) -> QuantizationConfig:
    """Return a config for ``calibrate``."""
    return QuantizationConfig(method="ptq", **settings)


CALIBRATED: dict[str, QuantizationConfig] = {
    "PTQ int8 dynamic": ptq(),
    "PTQ int8 static": ptq(scheme="int8_static"),
    "PTQ int8 static, percentile": ptq(scheme="int8_static", inputs={"observer": "percentile"}),
    "PTQ 4-bit weights": ptq(scheme="int4_weight_only"),
    "PTQ 4-bit weights, GPTQ": ptq(scheme="int4_weight_only", options={"rounding": "gptq"}),
}
TRAINED: dict[str, QuantizationConfig | None] = {
    "fp32, trained on": None,
    "QAT int8 dynamic": QuantizationConfig(),
    "QAT int8 static": QuantizationConfig(scheme="int8_static"),
    "LSQ int8 dynamic": QuantizationConfig(method="lsq"),
    "LSQ+ int8 static": QuantizationConfig(method="lsq_plus", scheme="int8_static"),
    "QAT 4-bit weights": QuantizationConfig(weights=WEIGHTS4),
    "LSQ 4-bit weights": QuantizationConfig(method="lsq", weights=WEIGHTS4),
}
TORCHAO = "torchao PTQ int8"
NAMES = [FP32, TORCHAO, *CALIBRATED, *TRAINED]
TARGETS = {
    "PTQ int8 dynamic": 0.5,
    "PTQ int8 static": 0.5,
    "QAT int8 dynamic": 0.2,
    "LSQ int8 dynamic": 0.2,
    "LSQ 4-bit weights": 1.5,
}

Run = dict[str, Any]


def dense(task: str, settings: Settings, seed: int, folder: Path) -> PreTrainedModel:
    """Return the fine-tuned model of a seed, made once."""
    if not (folder / "config.json").exists():
        set_seed(seed)
        trainer = trainer_of(pretrained(task), task, settings, settings.dense_steps, seed)
        trainer.train()
        trainer.model.save_pretrained(folder)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder)
    return model


def measured(model: PreTrainedModel, name: str, task: str, settings: Settings) -> float:
    """Return the accuracy: of the exported model where its numbers are torchao's."""
    if not name.endswith("int8 dynamic"):
        return accuracy(model, task, settings)[0]
    with tempfile.TemporaryDirectory() as folder:
        loaded = AutoModelForSequenceClassification.from_pretrained(export_quantized(model, folder, verify=False))
        return accuracy(loaded, task, settings)[0]


def run_of(name: str, model: PreTrainedModel, task: str, settings: Settings, seed: int) -> float:
    """Do what a row says to a copy of the dense model, and return the accuracy."""
    model = copy.deepcopy(model)
    if name == TORCHAO:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_inside)
    elif name in CALIBRATED:
        config = CALIBRATED[name]
        needs_data = config.formats().has_observed() or config.options
        calibrate(model, batches_of(task, settings, CALIBRATION_BATCHES) if needs_data else None, config)
    elif name in TRAINED:
        wanted = TRAINED[name]
        callbacks = [] if wanted is None else [QuantizationCallback(wanted)]
        gentle = replace(settings, learning_rate=settings.learning_rate / 10)
        trainer_of(model, task, gentle, settings.steps, seed, callbacks=callbacks).train()
    return measured(model, name, task, settings)


def _is_inside(module: Any, name: str) -> bool:
    """Whether torchao is to quantize a layer: those that we do, all Linear layers but the task head."""
    return type(module).__name__ == "Linear" and not name.startswith("classifier")


def costs(runs: list[Run], name: str) -> list[float]:
    """Return fp32 - this in points, for each seed that has both."""
    by_seed = {run["seed"]: 100 * run["accuracy"] for run in runs if run["name"] == FP32}
    return [by_seed[run["seed"]] - 100 * run["accuracy"] for run in runs if run["name"] == name]


def table(runs: list[Run]) -> str:
    """Return accuracies and costs as Markdown."""
    seeds = sorted({run["seed"] for run in runs})
    lines = [["", *(f"seed {seed}" for seed in seeds), "cost", "spread", "target"]]
    lines.append(["---", *["---:"] * (len(seeds) + 3)])
    for name in NAMES:
        found = {run["seed"]: 100 * run["accuracy"] for run in runs if run["name"] == name}
        if not found:
            continue
        row = [name, *(f"{found[seed]:.2f}" if seed in found else "-" for seed in seeds)]
        cost = costs(runs, name)
        row += [f"{mean(cost):+.2f}", f"{stdev(cost):.2f}" if len(cost) > 1 else "-", verdict(runs, name)]
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(runs: list[Run], name: str) -> str:
    """Return whether a row's target was reached."""
    if name not in TARGETS:
        return ""
    reached = mean(costs(runs, name)) <= TARGETS[name]
    return f"{TARGETS[name]:g}, {'reached' if reached else 'missed'}"


def write(path: Path, data: dict[str, Any]) -> None:
    """Write the JSON file, and the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    about, settings = data["environment"], data["settings"]
    title = (
        f"# What quantization costs in accuracy\n\nWritten by `scripts/bench/int8_accuracy.py`; {about['cpu']}, torch"
    )
    title += f" {about['torch']}, torchao {about.get('torchao', 'none')}, transformers {about['transformers']}."
    intro = f"{TASKS[data['task']].title}, {data['examples']:,} test examples, accuracy in percent. Dense: "
    intro += f"{settings['dense_steps']} steps of {settings['batch_size']}; trained with quantization: "
    intro += f"{settings['steps']} steps more."
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    text = f"{title}\n\n{intro}\n\n{table(data['runs'])}\n\n```\n{explained}```\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def loaded(path: Path, fixed: dict[str, Any]) -> dict[str, Any]:
    """Return what earlier runs left in the file, or an empty start."""
    if not path.exists():
        return {"environment": environment(), **fixed, "examples": 0, "runs": []}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    there = {name: data[name] for name in fixed}
    if there != fixed:
        sys.exit(f"error: {path} holds results of other settings ({there}); these are {fixed}. Give another file.")
    return data


def main() -> None:
    """Run what is missing, and write after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of all results")
    parser.add_argument("--task", choices=list(TASKS), default="movies")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="rows besides fp32 (default: all)")
    parser.add_argument("--dense-steps", type=int, default=600, help="optimizer steps of the dense model")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of training with quantization")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--examples", type=int, help="use so many training and test examples only")
    given = parser.parse_args()
    names = ("steps", "dense_steps", "batch_size", "max_length", "learning_rate", "examples")
    settings = Settings(start="finetuned", allocation="global", **{name: getattr(given, name) for name in names})
    data = loaded(given.json, {"settings": settings.to_dict(), "task": given.task})
    done = {(run["seed"], run["name"]) for run in data["runs"]}
    for seed in given.seeds:
        missing = [name for name in NAMES if (name == FP32 or name in given.only) and (seed, name) not in done]
        if not missing:
            continue
        model = dense(given.task, settings, seed, given.json.with_suffix("") / f"dense-{seed}")
        data["examples"] = accuracy(model, given.task, settings)[1]
        for name in missing:
            data["runs"].append(
                {"seed": seed, "name": name, "accuracy": run_of(name, model, given.task, settings, seed)}
            )
            print(json.dumps(data["runs"][-1]), file=sys.stderr, flush=True)
            write(given.json, data)
    print(table(data["runs"]))


if __name__ == "__main__":
    main()
