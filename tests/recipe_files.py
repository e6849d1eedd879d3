"""Folders of tiny models with tokenizers, data files, and recipes for them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy
import tiny_models
import torch
import trained_tokenizers
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import BertConfig, BertForQuestionAnswering, ViTConfig, ViTForImageClassification, ViTImageProcessor

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


def images(root: Path, channels: int = 3) -> dict[str, Any]:
    """A recipe for a tiny ViT and a folder of light and dark images."""
    generator = numpy.random.default_rng(0)
    for number in range(24):
        shade, name = ((40, "dark"), (200, "light"))[number % 2]
        folder = root / "images" / ("train" if number < 18 else "test") / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(shade, shade + 50, (20, 16), dtype="uint8")  # grey, and not square
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4,
        num_channels=channels, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(root / "vit")
    size = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    ViTImageProcessor(**size).save_pretrained(root / "vit")
    return {
        "model": str(root / "vit"),
        "task": "image-classification",
        "dataset": {"path": str(root / "images")},
        "pruning": PRUNING,
        "training": {**TRAINING, "max_steps": 30, "learning_rate": 1e-2},
        "output": str(root / "out"),
    }


def questions(root: Path, unanswerable: bool = False) -> dict[str, Any]:
    """A recipe for a tiny BERT and questions for a word of a sentence."""
    tokenizer = trained_tokenizers.word_piece()
    tokenizer.save_pretrained(root / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    BertForQuestionAnswering(config).save_pretrained(root / "bert")
    rows = []
    for number, sentence in enumerate(SENTENCES * 3):
        context = f"{sentence} {SENTENCES[(number + 1) % 7]}"
        word = context.split()[-2]
        answers = {"text": [word, word], "answer_start": [context.rindex(word)] * 2}
        if unanswerable and number % 3 == 0:
            answers = {"text": [], "answer_start": []}
        rows.append({"question": f"  which {number}", "context": context, "answers": answers})
    return {
        "model": str(root / "bert"),
        "task": "question-answering",
        "dataset": {
            "path": write_json(root / "squad.jsonl", rows),
            "text_columns": ["question", "context"],
            "max_length": 32,
            "stride": 8,
        },
        "pruning": PRUNING,
        "training": {**TRAINING, "max_steps": 4},
        "output": str(root / "out"),
    }


def translation(root: Path, **training: Any) -> dict[str, Any]:
    """A recipe for a tiny BART; the texts are parts of one column, as in WMT's data."""
    rows = [{"translation": {"en": f"{a} {b}", "ro": a}} for a in SENTENCES for b in SENTENCES[:2]]
    data = DatasetDict({"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:4])})
    data.save_to_disk(root / "wmt")
    return {
        "model": save_model(root / "bart", "seq2seq-lm"),
        "task": "seq2seq-lm",
        "dataset": {
            "path": str(root / "wmt"),
            "text_columns": "translation.en",
            "target_column": "translation.ro",
            "prefix": "translate: ",
            "max_length": 24,
        },
        "pruning": PRUNING,
        "training": {**TRAINING, "max_steps": 4, **training},
        "output": str(root / "out"),
    }


def language(root: Path) -> dict[str, Any]:
    """A recipe for a tiny GPT-2."""
    rows = [{"text": f"{a} {b}"} for a in SENTENCES for b in SENTENCES[:3]]
    return {
        "model": save_model(root / "gpt2", "causal-lm"),
        "task": "causal-lm",
        "dataset": {"path": write_json(root / "texts.jsonl", rows), "max_length": 24},
        "pruning": PRUNING,
        "training": {**TRAINING, "max_steps": 4},
        "output": str(root / "out"),
    }
