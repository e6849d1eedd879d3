"""Checkpoints pushed to the Hub while training, and runs that go on from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from hub_server import hub_server
from safetensors.torch import load

from hf_compress.callbacks.state import JSON_FILE, TENSOR_FILE, read_state

PROGRAM = Path(__file__).with_name("hub_checkpoints.py")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(the folder of the program, the Hub)."""
    folder = tmp_path_factory.mktemp("hub")
    paths = os.pathsep.join([str(PROGRAM.parents[2]), str(PROGRAM.parents[1])])
    with hub_server() as hub:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(folder)],
            env={**os.environ, **hub.environment(folder / "home"), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, hub


STATE = {JSON_FILE, TENSOR_FILE}


def names_in(files, folder) -> set[str]:
    return {path.removeprefix(folder) for path in files if path.startswith(folder)}


def test_every_pushed_checkpoint_holds_its_state(pushed, tmp_path) -> None:
    """In each commit, not only in the last: the upload runs beside the training."""
    _, hub = pushed
    for repo, folders in (
        ("checkpoint", {"last-checkpoint/": 2}),
        ("all_checkpoints", {"checkpoint-3/": 2, "checkpoint-6/": 1}),
    ):
        for folder, at_least in folders.items():
            with_it = [each.files for each in hub.commits(f"tester/{repo}") if names_in(each.files, folder)]
            assert len(with_it) >= at_least
            for number, files in enumerate(with_it):
                copy = tmp_path / repo / folder / str(number)
                copy.mkdir(parents=True)
                for name in names_in(files, folder):
                    (copy / name).write_bytes(files[folder + name])
                assert {"model.safetensors", "optimizer.pt", "trainer_state.json", *STATE} <= names_in(files, folder)
                assert set(read_state(copy)) == {"pruning", "distillation", "quantization"}


def test_a_pushed_model_is_a_plain_one(pushed) -> None:
    _, hub = pushed
    plain = tiny_models.bert().state_dict()
    for repo in ("every_save", "checkpoint", "all_checkpoints", "end"):
        files = hub.files(f"tester/{repo}")
        weights = load(files["model.safetensors"])
        assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in plain.items()}
        assert "quantization_config" not in json.loads(files["config.json"])
        top = {path for path in files if "/" not in path}
        assert {"model.safetensors", "config.json"} <= top
        assert not top & STATE
    for repo in ("every_save", "end"):
        assert not any("/" in path for path in hub.files(f"tester/{repo}"))


def test_a_run_that_pushes_at_the_end_does_it_once_and_its_shrunk_model_goes_the_same_way(pushed) -> None:
    folder, hub = pushed
    outcome = json.loads((folder / "outcomes.json").read_text())
    assert [commit.title for commit in hub.commits("tester/end")] == ["trained"]
    assert outcome["end"] == []
    assert outcome["parameters"]["small"] < outcome["parameters"]["end"]
    (small,) = hub.commits("tester/small")
    assert json.loads(small.files["config.json"])["quantization_config"]["quant_method"] == "hf_compress"


@pytest.mark.parametrize(("strategy", "first_step"), [("checkpoint", 7), ("all_checkpoints", 4)])
def test_a_run_goes_on_from_a_downloaded_checkpoint_bit_for_bit(pushed, strategy, first_step) -> None:
    outcome = json.loads((pushed[0] / "outcomes.json").read_text())[strategy]
    assert outcome["steps"] == list(range(first_step, 11))
    assert outcome["different"] == []
