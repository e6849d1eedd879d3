"""Folders of tiny models with tokenizers, data files, and recipes for them."""

import csv
import json
from pathlib import Path
from typing import Any

import tiny_models
import trained_tokenizers

SENTENCES = trained_tokenizers.SENTENCES[:7]
PRUNING = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 1, "end": 4, "update_every": 1}
TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


def save_model(folder: Path, task: str, **sizes: Any) -> str:
    """Save a tiny model that fits its tokenizer; return the folder's name."""
    build, make_tokenizer = {
        "text-classification": (tiny_models.bert, trained_tokenizers.word_piece),
        "causal-lm": (tiny_models.gpt2, trained_tokenizers.byte_level_bpe),
        "seq2seq-lm": (tiny_models.bart, trained_tokenizers.unigram),
    }[task]
    tokenizer = make_tokenizer()
    build(vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def reviews(number: int = 24) -> list[dict[str, Any]]:
    """Sentences with a class that their first word gives away."""
    sides = (("quick", "down"), ("lazy", "up"))
    return [{"review": f"{sides[i % 2][0]} {SENTENCES[i % 7]}", "stars": sides[i % 2][1]} for i in range(number)]


def classification(root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for text classification; ``changes`` replace fields."""
    if not (root / "model").exists():
        save_model(root / "model", "text-classification", num_labels=2)
    recipe = {
        "model": str(root / "model"),
        "task": "text-classification",
        "dataset": {
            "path": write_csv(root / "reviews.csv", reviews()),
            "text_columns": "review",
            "label_column": "stars",
            "max_length": 12,
        },
        "pruning": PRUNING,
        "training": TRAINING,
        "output": str(root / "out"),
    }
    return {**recipe, **changes}
