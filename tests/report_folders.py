"""What runs leave in folders, written by hand: no model is trained or loaded."""

import json
from pathlib import Path
from typing import Any

from hf_compress import ModelProfile, Recipe
from hf_compress.report.compare import Comparison
from hf_compress.report.results import Results

RECIPE: dict[str, Any] = {
    "model": "models/tiny",
    "task": "text-classification",
    "dataset": {"path": "data/reviews.csv", "text_columns": "review", "label_column": "stars"},
    "teacher": "models/tiny",
    "training": {"seed": 17, "max_steps": 4},
    "stages": [
        {"pruning": {"structures": {"heads": 0.25}}, "distillation": {"alpha": 0.5}},
        {"pruning": {"structures": {"ffn": 0.5}}, "training": {"seed": 18}},
    ],
}
SIZES = {"dense": 4_321_000, "stage-1": 3_456_000, "compressed": 2_109_000}
ACCURACY = {"dense": 84.32, "stage-1": 84.9, "compressed": 83.75}
LOGS = {
    "stage-1": [
        {
            "step": 1,
            "loss": 0.731,
            "heads_sparsity": 0.0,
            "distillation_loss": 0.41,
            "learning_rate": 5e-5,
            "epoch": 0.1,
        },
        {"step": 2, "loss": float("nan"), "heads_sparsity": 0.125, "distillation_loss": 0.32, "learning_rate": 4e-5},
        {"step": 4, "loss": 0.523, "heads_sparsity": 0.25, "distillation_loss": 0.21, "learning_rate": 1e-5},
        {"step": 4, "eval_loss": 0.6, "eval_accuracy": 0.849, "eval_runtime": 1.5},
        {"step": 4, "train_runtime": 9.75, "train_loss": 0.6, "total_flos": 1.0},
    ],
    "compressed": [
        {"step": 1, "loss": 0.512, "ffn_sparsity": 0.0, "learning_rate": 5e-5},
        {"step": 4, "loss": 0.401, "ffn_sparsity": 0.5, "learning_rate": 1e-5},
        {"step": 4, "eval_loss": 0.55, "eval_accuracy": 0.8375},
    ],
}
KEPT = {
    "stage-1": {"heads": [(4, 4), (2, 4)]},
    "compressed": {"heads": [(4, 4), (2, 4)], "ffn": [(20, 44), (24, 44)]},
}


def profile(parameters: int, **changes: Any) -> ModelProfile:
    facts: dict[str, Any] = {
        "model_class": "BertForSequenceClassification",
        "parameters": parameters,
        "encoder_parameters": parameters - 1_000_000,
        "embedding_parameters": 900_000,
        "flops": 300 * parameters,
        "bytes_on_disk": 4 * parameters,
        "measured_bytes": None,
        "peak_memory": 5 * parameters,
        "latency_ms": None,
        "inputs": {"input_ids": (1, 16)},
        "num_threads": 2,
    }
    return ModelProfile(**{**facts, **changes})


def comparison(sizes: dict[str, int] | None = None, metrics: Any = None, **changes: Any) -> Comparison:
    """The dense model beside others, whose latencies grow with their sizes."""
    sizes = SIZES if sizes is None else sizes
    dense, *others = sizes
    facts: dict[str, Any] = {
        "profiles": {name: profile(size) for name, size in sizes.items()},
        "latency_ms": {"batch 1": {name: size / 300_000 for name, size in sizes.items()}},
        "speedup": {"batch 1": {name: sizes[dense] / sizes[name] for name in others}},
        "metrics": {"accuracy (%)": ACCURACY} if metrics is None else metrics,
        "notes": ("timed on a quiet machine",),
        "environment": {"python": "3.12.99", "torch": "9.8.7", "cpu": "Imaginary 9000"},
    }
    return Comparison(**{**facts, **changes})


def results(model: str, table: Comparison | None = None, **changes: Any) -> Results:
    kept = {
        kind: [
            {"name": f"bert.encoder.layer.{layer}.{kind}", "kept": kept, "total": total}
            for layer, (kept, total) in enumerate(units)
        ]
        for kind, units in KEPT.get(model, {}).items()
    }
    facts: dict[str, Any] = {
        "name": f"tiny {model}",
        "model": model,
        "base_model": "tiny",
        "auto_class": "AutoModelForSequenceClassification",
        "task": "text-classification",
        "dataset": "reviews.csv",
        "num_evaluation_examples": 123,
        "comparison": (comparison() if table is None else table).to_dict(),
        "kept": kept,
        "recipe": Recipe.from_dict(RECIPE).to_dict(),
        "training": {"optimizer_steps": 4},
        "checks": ("the logits are the same after reloading",),
    }
    return Results(**{**facts, **changes})


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_run(folder: Path, table: Comparison | None = None, recipe: dict[str, Any] | None = None) -> Path:
    """Write a finished run of two stages; return its folder."""
    folder.mkdir(parents=True)
    table = comparison() if table is None else table
    Recipe.from_dict({**RECIPE, **(recipe or {}), "output": str(folder)}).save(folder / "recipe.yaml")
    names = [name for name in KEPT if name in table.profiles]
    for name in names:
        write_json(folder / name / "stage.json", {"metrics": {}, "optimizer_steps": 4, "tracked": []})
        write_json(folder / name / "log_history.json", LOGS[name])
        results(name, table).save(folder / name / "results.json")
        Recipe.from_dict({**RECIPE, **(recipe or {})}).save(folder / name / "recipe.yaml")
    data = {
        "folders": {name: name for name in names},
        "metrics": {},
        "comparison": table.to_dict(),
        "notes": ["labels: up, down"],
    }
    write_json(folder / "run.json", data)
    return folder
