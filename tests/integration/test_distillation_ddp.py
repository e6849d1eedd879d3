from pathlib import Path

import pytest
from ranks import on_two_ranks

from hf_compress.callbacks.state import read_state


@pytest.mark.multiprocess
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    on_two_ranks(Path(__file__).with_name("ddp_distillation.py"), str(tmp_path))
    for kind in ("bert", "llama"):
        assert list(read_state(tmp_path / kind / "checkpoint-1", 1)) == ["distillation"]
