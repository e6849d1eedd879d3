"""States of callbacks that are whole, and say what no callback would have written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_compress import PruningCallback, PruningConfig, TrainingError
from hf_compress.callbacks.state import Section, read_state, write_state

CONFIG = PruningConfig(structures={"ffn": 0.5}, criterion="taylor", schedule="linear")
MASK = "mask.bert.encoder.layer.0.ffn"


@pytest.fixture
def checkpoint(tiny_bert, classification_data, make_trainer, tmp_path) -> Path:
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tiny_bert(), classification_data(16), [PruningCallback(CONFIG)], **steps).train()
    return tmp_path / "run" / "checkpoint-2"


def rewrite(checkpoint: Path, section: Section) -> None:
    step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    write_state(checkpoint, step, {"pruning": section})


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("tensors", {}),
        ("tensors", {MASK: torch.ones(3, dtype=torch.bool)}),
        ("tensors", {MASK: torch.ones(())}),
        ("facts", {}),
        ("facts", {"window": "all of it"}),
        ("thresholds", 5),
        ("thresholds", None),
        ("step", "two"),
        ("step", None),
    ],
)
def test_what_no_callback_writes_ends_in_an_error_before_any_step(
    where, value, checkpoint, tiny_bert, classification_data, make_trainer
) -> None:
    section = read_state(checkpoint)["pruning"]
    if where in ("thresholds", "step"):
        section = replace(section, facts={**section.facts, where: value})
    elif where == "tensors" and value:
        section = replace(section, tensors={**section.tensors, **value})
    else:
        section = replace(section, **{where: value})
    rewrite(checkpoint, section)
    trainer = make_trainer(tiny_bert(), classification_data(16), [PruningCallback(CONFIG)], max_steps=4)
    with pytest.raises(TrainingError):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step <= 2
    assert type(trainer.model.bert.encoder.layer[0].output.dense) is torch.nn.Linear  # everything is off again


def test_the_same_state_written_again_resumes(checkpoint, tiny_bert, classification_data, make_trainer) -> None:
    rewrite(checkpoint, read_state(checkpoint)["pruning"])
    trainer = make_trainer(tiny_bert(), classification_data(16), [PruningCallback(CONFIG)], max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
