"""Push from one process, load by name in another, with nothing between them but a Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_round_trip
import pytest
import torch
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, hub_server
from safetensors.torch import load_file

pytest.importorskip("torchao")

PROGRAM = Path(hub_round_trip.__file__)
EVERYTHING = {*hub_round_trip.TEXT_REPOSITORIES, "image", "image-by-transformers"}


def run(hub: HubServer, mode: str, folder: Path, token: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Run the program in a process with an empty cache; return its logits and errors."""
    home = folder / f"home-{mode}-{token}"
    paths = os.pathsep.join([str(PROGRAM.parents[1]), str(PROGRAM.parents[0])])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), mode, str(folder)],
        env={**os.environ, **hub.environment(home, token), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return load_file(folder / f"{mode}.safetensors"), json.loads((folder / f"{mode}-errors.json").read_text())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> Iterator[tuple[HubServer, Path, dict[str, torch.Tensor]]]:
    """(the Hub, the folder of the program, logits of what was pushed)."""
    folder = tmp_path_factory.mktemp("hub")
    with hub_server() as hub:
        yield hub, folder, run(hub, "push", folder, WRITE_TOKEN)[0]


def test_what_is_loaded_by_name_computes_the_same_bit_for_bit(pushed) -> None:
    hub, folder, expected = pushed
    found, without_token = run(hub, "load", folder, READ_TOKEN)
    assert set(found) == EVERYTHING
    assert [name for name in EVERYTHING if not torch.equal(found[name], expected[name])] == []
    assert list(without_token) == ["private"]
    assert "tester/private is not a local folder" in without_token["private"]


def test_one_commit_holds_the_whole_folder(pushed) -> None:
    hub, _, _ = pushed
    (commit,) = hub.commits("tester/uneven")
    assert commit.title == "here is uneven"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(commit.files)
    assert len(hub.commits("tester/uneven", "int8")) == 1  # after the one that it began from
    assert "preprocessor_config.json" in hub.files("tester/image")
    assert hub.repositories["tester/private"].private
    assert not hub.repositories["tester/uneven"].private
    assert {commit.title for commit in hub.commits("tester/by-transformers")} == {"transformers alone"}
