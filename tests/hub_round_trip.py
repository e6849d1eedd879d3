"""Pushes models to a Hub, or loads them from there; run by test_hub_round_trip.py.

Usage: hub_round_trip.py push|load FOLDER, with HF_ENDPOINT set. Writes FOLDER/MODE.safetensors, the logits of every
repository, and FOLDER/MODE-errors.json, the errors of loading without a token.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from safetensors.torch import save_file
from trained_tokenizers import word_piece
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from uneven_models import uneven_bert

from hf_compress import export_quantized, push_to_hub

TEXT = "the quick brown fox jumps over the lazy dog"
IMAGE = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(16, 16, 3)

TEXT_REPOSITORIES = {
    "uniform": ("tester/uniform", None),
    "uneven": ("tester/uneven", None),
    "int8": ("tester/uneven", "int8"),
    "private": ("tester/private", None),
    "by transformers": ("tester/by-transformers", None),
    "by transformers, int8": ("tester/by-transformers", "int8"),
}


def read_text(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits


def read_image(model: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**processor(IMAGE, return_tensors="pt")).logits


def push(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = word_piece()
    models = {"uniform": tiny_models.bert(vocab_size=len(tokenizer)), "uneven": uneven_bert(vocab_size=len(tokenizer))}
    models["private"] = models["uneven"]
    for name in ("uniform", "uneven", "private"):
        models[name].save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        private = True if name == "private" else None
        push_to_hub(folder / name, f"tester/{name}", private=private, commit_message=f"here is {name}")
    export_quantized(models["uneven"], folder / "int8", verify=False)
    tokenizer.save_pretrained(folder / "int8")
    push_to_hub(folder / "int8", "uneven", revision="int8")

    for part in (models["uneven"], tokenizer):
        part.push_to_hub("tester/by-transformers", commit_message="transformers alone")
    for part in (AutoModelForSequenceClassification.from_pretrained(folder / "int8"), tokenizer):
        part.push_to_hub("tester/by-transformers", revision="int8")
    # Loaded as well: the last bit may depend on where in memory weights lie.
    folders = {name: name for name in TEXT_REPOSITORIES}
    folders |= {"by transformers": "uneven", "by transformers, int8": "int8"}
    found = {
        name: read_text(AutoModelForSequenceClassification.from_pretrained(folder / local), tokenizer)
        for name, local in folders.items()
    }

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model, processor = ViTForImageClassification(config), ViTImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained(folder / "image")
    processor.save_pretrained(folder / "image")
    push_to_hub(folder / "image", "tester/image")
    model.push_to_hub("tester/image-by-transformers")
    processor.push_to_hub("tester/image-by-transformers")
    logits = read_image(AutoModelForImageClassification.from_pretrained(folder / "image"), processor)
    return found | {"image": logits, "image-by-transformers": logits}


def load(errors: dict[str, str]) -> dict[str, torch.Tensor]:
    for name in ("private", "uneven"):
        try:
            AutoModelForSequenceClassification.from_pretrained(f"tester/{name}", token=False)
        except OSError as error:
            errors[name] = str(error)
    found = {}
    for name, (repository, revision) in TEXT_REPOSITORIES.items():
        model = AutoModelForSequenceClassification.from_pretrained(repository, revision=revision)
        found[name] = read_text(model, AutoTokenizer.from_pretrained(repository, revision=revision))
    for name in ("image", "image-by-transformers"):
        model = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
        found[name] = read_image(model, AutoImageProcessor.from_pretrained(f"tester/{name}"))
    return found


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    errors: dict[str, str] = {}
    found = push(folder) if mode == "push" else load(errors)
    # One file cannot hold what several names share.
    save_file({name: tensor.clone() for name, tensor in found.items()}, folder / f"{mode}.safetensors")
    (folder / f"{mode}-errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
