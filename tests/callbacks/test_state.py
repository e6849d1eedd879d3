import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compress.callbacks import state
from hf_compress.callbacks.state import JSON_FILE, TENSOR_FILE, Section, check_config, read_state, write_state
from hf_compress.errors import TrainingError

TRAINERS_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")

SECTIONS = {
    "pruning": Section(
        config={"criterion": "taylor", "structures": {"heads": 0.5}},
        tensors={"mask.layer.0": torch.tensor([True, False]), "score": torch.randn(3, 4).T},
        facts={"step": 7, "names": ["a", "b"]},
    ),
    "distillation": Section(config={"alpha": 0.9}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as the Trainer leaves it, before any callback wrote to it."""
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(os.urandom(3 * state._BLOCK + 5))
    for name in TRAINERS_FILES[1:-1]:
        (checkpoint / name).write_bytes(os.urandom(20))
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    return checkpoint


def test_everything_comes_back(folder: Path) -> None:
    write_state(folder, 7, SECTIONS)
    sections = read_state(folder, 7)
    assert list(sections) == ["pruning", "distillation"]
    assert sections["pruning"].config == SECTIONS["pruning"].config
    assert sections["pruning"].facts == SECTIONS["pruning"].facts
    for name, tensor in SECTIONS["pruning"].tensors.items():
        assert torch.equal(sections["pruning"].tensors[name], tensor)
        assert sections["pruning"].tensors[name].dtype == tensor.dtype
    assert sections["distillation"].tensors == {}
    assert {path.name for path in folder.iterdir()} == {JSON_FILE, TENSOR_FILE, *TRAINERS_FILES}


def test_writing_twice_gives_the_same_bytes(folder: Path) -> None:
    write_state(folder, 7, SECTIONS)
    first = [(folder / name).read_bytes() for name in (JSON_FILE, TENSOR_FILE)]
    write_state(folder, 7, SECTIONS)
    assert first == [(folder / name).read_bytes() for name in (JSON_FILE, TENSOR_FILE)]


def edit_json(folder: Path, key: str, value: Any) -> None:
    document = json.loads((folder / JSON_FILE).read_text())
    (folder / JSON_FILE).write_text(json.dumps({**document, key: value}))


def flip_last_byte(path: Path) -> None:
    payload = path.read_bytes()
    path.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))


DAMAGES = {
    "no JSON file": (lambda folder: (folder / JSON_FILE).unlink(), f"no {JSON_FILE}"),
    "no tensor file": (lambda folder: (folder / TENSOR_FILE).unlink(), f"no {TENSOR_FILE}"),
    "half a JSON file": (lambda folder: (folder / JSON_FILE).write_text('{"schema'), "cannot be read"),
    "JSON list": (lambda folder: (folder / JSON_FILE).write_text("[]"), "not a JSON object"),
    "no sections": (lambda folder: edit_json(folder, "sections", None), "incomplete"),
    "no fingerprints": (lambda folder: edit_json(folder, "checkpoint", None), "incomplete"),
    "newer version": (lambda folder: edit_json(folder, "schema_version", 99), "schema_version is 99"),
    "other step": (lambda folder: edit_json(folder, "global_step", 6), "written at step 6"),
    "changed tensors": (lambda folder: flip_last_byte(folder / TENSOR_FILE), "sha256"),
    "changed weights": (
        lambda folder: flip_last_byte(folder / "model.safetensors"),
        "model.safetensors changed",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors changed"),
    "other run": (lambda folder: flip_last_byte(folder / "trainer_state.json"), "trainer_state.json changed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    write_state(folder, 7, SECTIONS)
    damage(folder)
    with pytest.raises(TrainingError, match=message):
        read_state(folder, 7)


def test_the_error_names_the_checkpoints_that_are_complete(folder: Path) -> None:
    earlier = folder.with_name("checkpoint-5")
    shutil.copytree(folder, earlier)
    write_state(earlier, 5, SECTIONS)
    with pytest.raises(TrainingError, match=r"complete checkpoint \(checkpoint-5\)"):
        read_state(folder, 7)


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_between_two_writes_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    """Over an older state too, as when a run is started again in the same folder."""
    write_state(folder, 7, {"distillation": Section({"alpha": 0.9}, {"x": torch.zeros(2)})})
    (folder / "model.safetensors").write_bytes(os.urandom(100))
    replace, calls = os.replace, []

    def dying_replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        write_state(folder, 7, SECTIONS)
    with pytest.raises(TrainingError):
        read_state(folder, 7)
    monkeypatch.undo()
    write_state(folder, 7, SECTIONS)
    assert read_state(folder, 7)["pruning"].facts == SECTIONS["pruning"].facts


def test_large_weights_are_sampled_to_both_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_MAX_BLOCKS", 2)
    write_state(folder, 7, SECTIONS)
    read_state(folder, 7)
    flip_last_byte(folder / "model.safetensors")
    with pytest.raises(TrainingError, match=r"model\.safetensors changed"):
        read_state(folder, 7)


def test_a_changed_config_is_listed_field_by_field(folder: Path) -> None:
    stored = json.loads(json.dumps({"alpha": 0.9, "exclude": ("a",), "loss": "kl"}))
    check_config(folder, "distillation", stored, {"alpha": 0.9, "exclude": ("a",), "loss": "kl"})
    with pytest.raises(TrainingError, match=r"alpha: 0\.9 in the checkpoint, 0\.5 now; new: None .* True now"):
        check_config(folder, "distillation", stored, {"alpha": 0.5, "exclude": ("a",), "loss": "kl", "new": True})
