"""The README's commands start as many processes as they say; one that does not is noticed."""

import re
from pathlib import Path

import launched
import pytest
from ranks import ROOT, TORCHRUN, run

pytestmark = pytest.mark.multiprocess

SCRIPT = launched.__file__
MODULES = {"torchrun": "torch.distributed.run", "accelerate launch": "accelerate.commands.launch"}
WARNING = "a single process is training"


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Several processes")[1].split("\n## ")[0]
    block = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[0]
    return [line.split("#")[0].strip() for line in block.splitlines()]


def arguments(command: str, folder: Path) -> list[str]:
    launcher = next(name for name in MODULES if command.startswith(f"{name} "))
    options = command.removeprefix(launcher).split()
    assert options.pop() == "train.py"
    return ["-m", MODULES[launcher], *options, SCRIPT, str(folder)]


def left_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("rank*")}


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_readme_start_two_processes(tmp_path: Path, command: str) -> None:
    done = run(*arguments(command, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert left_in(tmp_path) == {"rank0": "2", "rank1": "2"}
    assert WARNING not in done.stdout + done.stderr


def test_debug_launcher(tmp_path: Path) -> None:
    done = run(SCRIPT, str(tmp_path), "debug_launcher")
    assert done.returncode == 0, done.stderr[-3000:]
    assert left_in(tmp_path) == {"rank0": "2", "rank1": "2"}


@pytest.mark.parametrize("options", ["--cpu --num_processes 2", "--num_processes 2"])
def test_a_launcher_that_starts_one_process_instead_is_noticed(tmp_path: Path, options: str) -> None:
    done = run(*arguments(f"accelerate launch {options} train.py", tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert left_in(tmp_path) == {"rank0": "1"}
    assert WARNING in done.stderr


def test_one_process_on_purpose_is_no_reason_to_warn(tmp_path: Path) -> None:
    done = run(*arguments("accelerate launch --cpu --num_processes 1 train.py", tmp_path))
    assert left_in(tmp_path) == {"rank0": "1"}
    assert WARNING not in done.stdout + done.stderr


def test_the_launcher_ends_all_processes_where_one_dies_in_training(tmp_path: Path) -> None:
    done = run(*TORCHRUN, SCRIPT, str(tmp_path), "dies", timeout=120)
    assert done.returncode != 0
    assert "power cut on rank 1" in done.stderr
    assert left_in(tmp_path) == {}
