"""Law 7, ranks agree, and law 6, several ranks compute what one does."""

from pathlib import Path

import pytest
import rank_faults
import rank_runs
import torch
from rank_runs import load
from ranks import on_two_ranks

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning"),  # of layers
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what their runs came to."""
    path = tmp_path_factory.mktemp("two_ranks")
    on_two_ranks(Path(rank_runs.__file__), str(path))
    return path


@pytest.mark.parametrize("name", rank_runs.RUNS)
def test_ranks_hold_the_same_after_every_step(folder: Path, name: str) -> None:
    rank_runs.assert_ranks_agree(folder, name)


@pytest.mark.parametrize("name", rank_runs.SETTINGS)
def test_two_ranks_compute_what_one_does(folder: Path, tmp_path: Path, name: str) -> None:
    rank_runs.assert_same_as_one_process(folder, name, tmp_path)


def test_gates_that_stay_open_change_nothing_for_ragged_batches(folder: Path) -> None:
    """Law 1: the last batch is shorter, and so is the last accumulation."""
    plain, neutral = load(folder, "ragged-plain"), load(folder, "ragged-neutral")
    weights = [key for key in plain if key.startswith("weight.")]
    assert weights
    assert all(torch.equal(plain[key], neutral[key]) for key in weights)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what went well, see ``rank_faults``."""
    path = tmp_path_factory.mktemp("faults")
    on_two_ranks(Path(rank_faults.__file__), str(path))
    return path


@pytest.mark.parametrize("name", rank_faults.CHECKS)
def test_faults(faults: Path, name: str) -> None:
    assert all((faults / f"{name}.rank{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resumed_is_straight(faults: Path, step: int) -> None:
    """Law 5 on two ranks."""
    for rank in (0, 1):
        straight = load(faults / "resuming", "straight", rank)
        resumed = load(faults / "resuming", f"resumed{step}", rank)
        compared = [key for key in straight if key.startswith(("weight.", "mask.", "step6."))]
        assert len(compared) > 50
        assert [key for key in compared if not torch.equal(straight[key], resumed[key])] == []
