import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compress.callbacks import state
from hf_compress.callbacks.state import (
    JSON_FILE,
    TENSOR_FILE,
    Section,
    check_config,
    digest_of,
    last_complete_checkpoint,
    read_state,
    write_state,
)
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


def edit_json(folder: Path, key: str, value: Any, *, sign: bool = True) -> None:
    document = {**json.loads((folder / JSON_FILE).read_text()), key: value}
    if sign:  # as a program would that writes such a file
        document["digest"] = digest_of(document)
    (folder / JSON_FILE).write_text(json.dumps(document))


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


EDITS: dict[str, Any] = {
    "sections": {"pruning": {"config": {}, "facts": {}, "tensors": []}},
    "global_step": 8,
    "digest": "",
    "remark": "edited by hand",
}


@pytest.mark.parametrize("key", EDITS)
def test_a_file_edited_by_hand_is_refused(folder: Path, key: str) -> None:
    write_state(folder, 7, SECTIONS)
    edit_json(folder, key, EDITS[key], sign=False)
    with pytest.raises(TrainingError, match=rf"{JSON_FILE}: its contents are not .*digest is another.*edited"):
        read_state(folder, 7)


def test_a_file_without_digest_is_refused(folder: Path) -> None:
    write_state(folder, 7, SECTIONS)
    document = json.loads((folder / JSON_FILE).read_text())
    del document["digest"]
    (folder / JSON_FILE).write_text(json.dumps(document))
    with pytest.raises(TrainingError, match="digest is missing"):
        read_state(folder, 7)


def test_the_digest_is_that_of_what_is_read_back(folder: Path) -> None:
    """Numbers as keys become texts, and sort otherwise."""
    facts = {"by layer": {9: 0.1, 10: float("inf")}, "pair": (1, 2)}
    write_state(folder, 7, {"pruning": Section({}, {}, facts)})
    assert read_state(folder, 7)["pruning"].facts == {"by layer": {"9": 0.1, "10": float("inf")}, "pair": [1, 2]}


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


def test_the_newest_complete_checkpoint_is_found(folder: Path) -> None:
    write_state(folder, 7, SECTIONS)
    older = folder.with_name("checkpoint-5")
    shutil.copytree(folder, older)
    write_state(older, 5, SECTIONS)
    for number in range(10, 13):  # newer by number, not by name
        folder.with_name(f"checkpoint-{number}").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert last_complete_checkpoint(folder.parent) == str(folder)
    assert [str(each.message).split()[0] for each in caught] == [
        str(folder.with_name(f"checkpoint-{number}")) for number in (12, 11, 10)
    ]


@pytest.mark.parametrize("name", TRAINERS_FILES)
@pytest.mark.parametrize("how", ["cut off", "empty", "gone", "another"])
def test_a_checkpoint_with_a_damaged_file_of_the_trainer_is_passed_over(folder: Path, name: str, how: str) -> None:
    write_state(folder, 7, SECTIONS)
    path = folder / name
    {
        "cut off": lambda: path.write_bytes(path.read_bytes()[:-1]),
        "empty": lambda: path.write_bytes(b""),
        "gone": path.unlink,
        "another": lambda: flip_last_byte(path),
    }[how]()
    with pytest.warns(UserWarning, match=f"checkpoint-7 is passed over: .*{name} changed"):
        assert last_complete_checkpoint(folder.parent) is None
    with pytest.raises(TrainingError, match=f"{name} changed after"):
        read_state(folder, 7)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


GARBAGE = {
    "a folder for the JSON file": lambda folder: make_folder(folder / JSON_FILE),
    "a folder for the tensor file": lambda folder: make_folder(folder / TENSOR_FILE),
    "a folder for the weights": lambda folder: make_folder(folder / "model.safetensors"),
    "bytes that are no text": lambda folder: (folder / JSON_FILE).write_bytes(b"\xff\xfe\x00"),
    "brackets without end": lambda folder: (folder / JSON_FILE).write_text("[" * 100_000),
    "a number": lambda folder: (folder / JSON_FILE).write_text("1"),
    "sections that are none": lambda folder: edit_json(folder, "sections", {"pruning": 3}),
    "digests that are none": lambda folder: edit_json(folder, "checkpoint", {}),
    "another folder's state": lambda folder: edit_json(folder, "global_step", 8),
    "a tensor file of another kind": lambda folder: (
        (folder / TENSOR_FILE).write_bytes(b"xyz"),
        edit_json(folder, "sha256", hashlib.sha256(b"xyz").hexdigest()),
    ),
    "all of it gone": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_passed_over(folder: Path, name: str) -> None:
    write_state(folder, 7, SECTIONS)
    GARBAGE[name](folder)
    with pytest.warns(UserWarning, match="checkpoint-7 is passed over"):
        assert last_complete_checkpoint(folder.parent) is None
    with pytest.raises(TrainingError, match=r"hf_compress_state|model\.safetensors"):
        read_state(folder, 7)


def test_the_newest_checkpoint_of_a_downloaded_repository_is_found(folder: Path) -> None:
    write_state(folder, 7, SECTIONS)
    pulled = folder.with_name("last-checkpoint")
    shutil.copytree(folder, pulled)
    assert last_complete_checkpoint(folder.parent) == str(folder)  # of two that are alike, the run's own
    write_state(pulled, 8, SECTIONS)
    assert last_complete_checkpoint(folder.parent) == str(pulled)
    write_state(pulled, 6, SECTIONS)
    assert last_complete_checkpoint(folder.parent) == str(folder)
    shutil.rmtree(folder)
    assert last_complete_checkpoint(folder.parent) == str(pulled)
    (pulled / JSON_FILE).write_text("{}")
    with pytest.warns(UserWarning, match="last-checkpoint is passed over"):
        assert last_complete_checkpoint(folder.parent) is None


def test_nothing_to_resume_from_is_none(tmp_path: Path) -> None:
    for name in ("checkpoint-x", "checkpoint-", "my-checkpoint-3", "checkpoint-4-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(str(tmp_path / "missing")) is None
    assert last_complete_checkpoint(tmp_path / "checkpoint-9") is None


def test_what_a_killed_process_left_behind_is_used_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_state(folder, 7, SECTIONS)
    assert {path.name for path in folder.iterdir()} - {*TRAINERS_FILES} == {f".{TENSOR_FILE}.tmp"}
    monkeypatch.undo()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    write_state(folder, 7, SECTIONS)
    assert {path.name for path in folder.iterdir()} == {JSON_FILE, TENSOR_FILE, *TRAINERS_FILES}


def test_files_that_other_ranks_still_write_are_not_covered(folder: Path) -> None:
    (folder / "rng_state_1.pth").write_bytes(b"half")
    write_state(folder, 7, SECTIONS, {"rng_state_1.pth"})
    (folder / "rng_state_1.pth").write_bytes(b"half and half")
    read_state(folder, 7)
    write_state(folder, 7, SECTIONS)
    (folder / "rng_state_1.pth").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"rng_state_1\.pth changed"):
        read_state(folder, 7)


def test_shards_in_folders_are_covered(folder: Path) -> None:
    shard = folder / "optimizer_0" / "__0_0.distcp"
    shard.parent.mkdir()
    shard.write_bytes(b"rank 0")
    write_state(folder, 7, SECTIONS)
    shard.write_bytes(b"rank 1")
    with pytest.raises(TrainingError, match=r"optimizer_0/__0_0\.distcp changed"):
        read_state(folder, 7)
