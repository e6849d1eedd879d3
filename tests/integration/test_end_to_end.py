"""One Trainer run with all three callbacks, shrink, save, reload in a fresh process: laws 1 to 5 together."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    shrink,
)

FRESH_PROCESS = """
import json, sys, torch, hf_compress
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 33).view(3, 10)).logits
json.dump([[x.hex() for x in row] for row in logits.tolist()], sys.stdout)
"""


def callbacks(teacher, structures=None):
    return {
        "pruning": PruningCallback(
            PruningConfig(structures=structures or {"heads": 0.5, "ffn": 0.6}, begin=1, end=4, update_every=1)
        ),
        "distillation": DistillationCallback(DistillationConfig(alpha=0.5), teacher=teacher),
        "quantization": QuantizationCallback(QuantizationConfig()),
    }


@pytest.fixture
def run(tiny_bert, classification_data, make_trainer):
    def train(order=("pruning", "distillation", "quantization"), resume=None, **options):
        available = callbacks(tiny_bert(seed=1))
        trainer = make_trainer(
            tiny_bert(), classification_data(32), [available[name] for name in order], max_steps=6, **options
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_result_reloads_bit_identically_in_a_fresh_process(run, tmp_path) -> None:
    small = shrink(run())
    small.save_pretrained(tmp_path / "small")
    output = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "small")], capture_output=True, text=True, check=True
    ).stdout
    with torch.no_grad():
        logits = small(input_ids=torch.arange(3, 33).view(3, 10)).logits
    assert json.loads(output) == [[x.hex() for x in row] for row in logits.tolist()]


def test_saving_a_reloaded_model_writes_the_same_bytes(run, tmp_path) -> None:
    """Law 3."""
    shrink(run()).save_pretrained(tmp_path / "first")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_reloaded_model_trains_in_a_plain_trainer(run, tmp_path, classification_data, make_trainer) -> None:
    shrink(run()).save_pretrained(tmp_path / "small")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(model, classification_data(16), max_steps=2).train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if "position" not in name)


@pytest.mark.parametrize("order", list(itertools.permutations(("pruning", "distillation", "quantization")))[1:])
def test_the_order_of_the_callbacks_does_not_matter(run, order) -> None:
    assert same_weights(run().model, run(order).model)


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_resumed_equals_straight(run, tmp_path, kill_at) -> None:
    """Law 5, with dropout, in and after the pruning window."""
    straight = run(save_strategy="steps", save_steps=1)
    resumed = run(resume=str(tmp_path / "run" / f"checkpoint-{kill_at}"))
    assert same_weights(straight.model, resumed.model)
    first, second = (shrink(t) for t in (straight, resumed))
    assert first.config.quantization_config == second.config.quantization_config


def test_pruning_sees_the_same_units_whether_or_not_weights_are_fake_quantized_first(
    tiny_bert, classification_data, make_trainer
) -> None:
    """The analysis must not trip over fake quantizers that are attached already."""
    available = callbacks(tiny_bert(seed=1))
    trainer = make_trainer(
        tiny_bert(), classification_data(32), [available["quantization"], available["pruning"]], max_steps=6
    )
    trainer.train()
    masks = available["pruning"].masks()
    assert {name.rsplit(".", 1)[1] for name in masks} == {"heads", "ffn"}
    assert len(masks) == 4


def test_evaluation_of_the_shrunk_model_agrees_with_the_trainers_own(run, classification_data) -> None:
    """Evaluation after training sees masks and fake quantization; so does the shrunk model once quantized alike."""
    trainer = run(order=("pruning", "distillation"))
    data = classification_data(16, seed=3)
    own = trainer.predict(data).predictions
    small = Trainer(shrink(trainer), trainer.args).predict(data).predictions
    assert abs(own - small).max() < 1e-5 * abs(own).max()


def test_checkpoints_hold_plain_keys_and_one_state_file(run, tmp_path) -> None:
    """Law 4."""
    from safetensors import safe_open

    trainer = run(save_strategy="steps", save_steps=3)
    folder = tmp_path / "run" / "checkpoint-3"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trainer.model.state_dict())
    state = json.loads((folder / "hf_compress_state.json").read_text())
    assert set(state["sections"]) == {"pruning", "distillation", "quantization"}
    assert AutoModelForSequenceClassification.from_pretrained(folder).num_parameters() == trainer.model.num_parameters()
