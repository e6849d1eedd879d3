"""FSDP version 2 on two ranks computes what one process does, in a Trainer and by hand."""

from pathlib import Path

import pytest
import rank_fsdp
import rank_runs
import torch
from ranks import on_two_ranks
from safetensors.torch import load_file

from hf_compress import shrink

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning"),  # of layers
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what their runs came to."""
    path = tmp_path_factory.mktemp("fsdp")
    on_two_ranks(Path(rank_fsdp.__file__), str(path))
    return path


@pytest.mark.parametrize("name", rank_fsdp.SETTINGS)
def test_sharded_training_is_that_of_one_process(folder: Path, tmp_path: Path, name: str) -> None:
    rank_runs.assert_ranks_agree(folder, name)
    trainer = rank_runs.assert_same_as_one_process(folder, name, tmp_path)
    if rank_runs.SETTINGS[name][1] in rank_fsdp.SHRUNK:
        small = shrink(trainer).state_dict()
        for rank in (0, 1):
            other = load_file(folder / name / f"small{rank}.safetensors")
            assert other.keys() == small.keys()
            for key, tensor in small.items():
                torch.testing.assert_close(other[key], tensor, rtol=1e-9, atol=1e-9, msg=key)
