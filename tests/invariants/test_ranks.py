"""Law 7, ranks agree, and law 6, several ranks compute what one does."""

from pathlib import Path

import pytest
import rank_runs
import torch
from ranks import on_two_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.multiprocess

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what their runs came to."""
    path = tmp_path_factory.mktemp("two_ranks")
    on_two_ranks(Path(rank_runs.__file__), str(path))
    return path


def of_rank(folder: Path, name: str, rank: int = 0) -> Tensors:
    return load_file(folder / name / f"rank{rank}.safetensors")


@pytest.mark.parametrize("name", rank_runs.RUNS)
def test_ranks_hold_the_same_after_every_step(folder: Path, name: str) -> None:
    first, second = of_rank(folder, name, 0), of_rank(folder, name, 1)
    assert not torch.equal(first.pop("seen"), second.pop("seen"))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    if name.split("-")[-1] in ("taylor", "l2", "all", "scaled"):
        assert sum(key.startswith("step") and ".mask." in key for key in first) >= 4 * 4


@pytest.mark.parametrize("name", rank_runs.COMPARED)
def test_two_ranks_compute_what_one_does(folder: Path, tmp_path: Path, name: str) -> None:
    """In double precision; scores and scales are kept in single precision, the distillation loss's scale is not."""
    rank_runs.COMPARED[name](tmp_path / "one")
    one, two = of_rank(tmp_path, "one"), of_rank(folder, name)
    both = torch.cat([of_rank(folder, name, rank)["seen"] for rank in (0, 1)])
    assert sorted(both.tolist()) == sorted(one.pop("seen").tolist())
    assert one.keys() == two.keys() - {"seen"}
    for key, tensor in one.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(tensor, two[key]), key
        elif ".score." in key:
            scale = 2 if name == "scaled" else 1
            torch.testing.assert_close(two[key], scale * tensor, rtol=1e-5, atol=1e-7, msg=key)
        elif key.startswith("weight."):
            torch.testing.assert_close(two[key], tensor, rtol=1e-9, atol=1e-9, msg=key)
        elif key == "logged" and name != "scaled":
            torch.testing.assert_close(two[key], tensor, rtol=1e-6, atol=1e-6, msg=key)
