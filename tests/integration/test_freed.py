"""Nothing of a run stays in memory once the user has let go of it."""

import gc
import weakref

import pytest
import torch
from transformers import Trainer

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    shrink,
)


def callbacks(kind: str, teacher: torch.nn.Module) -> list:
    made = {
        "pruning": lambda: PruningCallback(PruningConfig(structures={"heads": 0.5, "ffn": 0.5}, begin=0, end=2)),
        "distillation": lambda: DistillationCallback(DistillationConfig(), teacher),
        "features": lambda: DistillationCallback(
            DistillationConfig(features=({"loss": "hidden_mse"}, {"loss": "attention_kl"})), teacher
        ),
        "quantization": lambda: QuantizationCallback(QuantizationConfig(scheme="int8_static")),
    }
    return [made[each]() for each in kind.split("+")]


@pytest.mark.parametrize(
    "kind", ["pruning", "distillation", "features", "quantization", "pruning+features+quantization"]
)
def test_models_and_trainers_are_freed(kind, tiny_bert, classification_data, make_trainer) -> None:
    def run() -> list[weakref.ref]:
        model, teacher = tiny_bert(), tiny_bert(seed=1)
        trainer: Trainer = make_trainer(model, classification_data(), callbacks(kind, teacher))
        trainer.train()
        kept = [model, teacher, trainer]
        if "pruning" in kind:
            kept.append(shrink(trainer))
        return [weakref.ref(each) for each in kept]

    left = run()
    gc.collect()
    assert [type(each()).__name__ for each in left if each() is not None] == []
