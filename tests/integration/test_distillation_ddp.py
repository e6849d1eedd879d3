import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.callbacks.state import JSON_FILE, read_state


@pytest.mark.multiprocess
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    program = Path(__file__).with_name("ddp_distillation.py")
    paths = [str(program.parents[2]), str(program.parents[1])]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(program),
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for kind in ("bert", "llama"):
        folder = tmp_path / kind / "checkpoint-1"
        assert list(read_state(folder, 1)) == ["distillation"]
        covered = json.loads((folder / JSON_FILE).read_text())["checkpoint"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(covered)
