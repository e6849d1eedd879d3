"""Start a program of the tests in two processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(*command: str, timeout: int = 300, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with the package and the tests on its path, one thread per process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def on_two_ranks(program: Path, *arguments: str) -> None:
    """Run a program under torchrun.

    Raises:
        AssertionError: If a process failed; with the end of what was printed.
    """
    done = run(*TORCHRUN, str(program), *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
