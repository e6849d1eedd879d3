"""Training a stand-in's dense model."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_compress import DatasetConfig
from hf_compress.config.recipe import PlainRun
from hf_compress.recipe.trainer import make_trainer, prepare

FACTS = "training.yaml"
"""How the model was trained, in its folder."""

COMMON = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0}


def train_dense(start: Path, folder: Path, task: str, data: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Train a model as a recipe would, and save it with its tokenizer or image processor.

    Args:
        start: Folder of the model and of its tokenizer or image processor.
        folder: Where the trained one goes; may be the same.
        task: The recipe's task.
        data: Fields of the recipe's data set.
        training: Training arguments.
    """
    recipe = PlainRun(model=str(start), task=task, dataset=DatasetConfig(**data), training={**COMMON, **training})
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe, Path(scratch))
        trainer = make_trainer(prepared, [])
        trainer.train()
        found = trainer.accelerator.unwrap_model(trainer.model).to("cpu")
    found.save_pretrained(folder)
    prepared.processor.save_pretrained(folder)
    facts = {
        **training,
        "optimizer_steps": trainer.state.global_step,
        "training_examples": len(prepared.splits.train),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    (folder / FACTS).write_text(yaml.safe_dump(facts, sort_keys=False), encoding="utf-8")
