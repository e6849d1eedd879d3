import json
from pathlib import Path

import pytest
from ranks import on_two_ranks

from hf_compress.callbacks.state import JSON_FILE, read_state


@pytest.mark.multiprocess
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    on_two_ranks(Path(__file__).with_name("ddp_distillation.py"), str(tmp_path))
    for kind in ("bert", "llama"):
        folder = tmp_path / kind / "checkpoint-1"
        assert list(read_state(folder, 1)) == ["distillation"]
        covered = json.loads((folder / JSON_FILE).read_text())["checkpoint"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(covered)
