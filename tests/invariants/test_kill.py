"""A run that is killed at any moment, and started again, ends where one ends that nobody disturbed."""

import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import resumable
import torch
from resumable import assert_same, tensors_of, train_to_the_end

from hf_compress import last_complete_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning")  # of layers

TESTS = Path(resumable.__file__).parent
STEP_PREFIX = "checkpoint-"


@pytest.fixture(scope="module")
def processes():
    """A context whose processes are forked from one that has everything imported, and no threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["resumable"])
        yield context


class Run:
    """A run in other processes, which die and are replaced, beside one that is left alone."""

    def __init__(self, processes, method: str, folder: Path, **args) -> None:
        self.processes, self.method, self.args = processes, method, args
        self.results, self.output = folder / "results.pt", folder / "run"
        self.straight, self.straight_results = folder / "straight", folder / "straight.pt"
        straight = self.start(None, None, self.straight, self.straight_results, {**args, "save_total_limit": None})
        straight.join()
        assert straight.exitcode == 0
        self.complete = 0

    def start(self, connection, kill_at=None, output=None, results=None, args=None):
        arguments = (
            self.method, output or self.output, results or self.results, args or self.args, connection, kill_at,
        )  # fmt: skip
        process = self.processes.Process(target=train_to_the_end, args=arguments)
        process.start()
        return process

    def killed_at_operation(self, step: int, number: int) -> bool:
        """Start, and die before the n-th operation on files while a step is saved; False if there were fewer."""
        process = self.start(None, (step, number))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode != 0:
            self.check(step)
        return process.exitcode != 0

    def killed_after(self, step: int, seconds: float) -> None:
        """Start, and die so long after the saving of a step began; or later, if there are no checkpoints yet."""
        mine, its = self.processes.Pipe()
        process = self.start(its)
        its.close()
        while mine.recv() < step:
            pass
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        self.check(step)

    def check(self, step: int) -> None:
        """No more is lost than the checkpoint that was being written, and what is left is as it should be."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = last_complete_checkpoint(self.output)
        assert found is not None or step <= self.args["save_steps"]
        if found is not None:
            left = int(Path(found).name.removeprefix(STEP_PREFIX))
            assert left >= max(self.complete, step - self.args["save_steps"])
            self.complete = left
            assert_same(tensors_of(Path(found)), tensors_of(self.straight / Path(found).name))

    def finish(self) -> None:
        process = self.start(None)
        process.join()
        assert process.exitcode == 0
        self.compare()

    def compare(self) -> None:
        """The run is over: it is the one that nobody disturbed."""
        assert_same(torch.load(self.results), torch.load(self.straight_results))
        last = f"{STEP_PREFIX}{self.args['max_steps']}"
        assert_same(tensors_of(self.output / last), tensors_of(self.straight / last))


def test_three_kills_while_saving_change_nothing(processes, tmp_path) -> None:
    """Between weights and optimizer, before our last file is there, and while the older checkpoint is deleted."""
    run = Run(processes, "all", tmp_path, max_steps=10, save_steps=2, save_total_limit=1)
    for step, number in ((4, 5), (6, 16), (8, 22)):
        assert run.killed_at_operation(step, number)
    run.finish()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_kill_before_any_operation_of_a_save_changes_nothing(processes, tmp_path) -> None:
    run = Run(processes, "all", tmp_path, max_steps=10, save_steps=2, save_total_limit=1)
    assert run.killed_at_operation(4, 1)
    before = tmp_path / "before"
    shutil.copytree(run.output, before)
    number = 1
    while run.killed_at_operation(4, number):
        number += 1
        if run.complete == 4:  # the next process has to save it again
            shutil.rmtree(run.output)
            shutil.copytree(before, run.output)
            run.complete = 2
    assert number > 30, "the hook saw the Trainer's operations and ours"
    run.compare()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("method", resumable.METHODS)
def test_twenty_random_kills_change_nothing(processes, tmp_path, method) -> None:
    """Half of them spread over the time of a save."""
    chance = random.Random(method)
    run = Run(processes, method, tmp_path, max_steps=100, save_steps=2, save_total_limit=2)
    for kill in range(20):
        step = run.complete + chance.randint(2, 4)
        step += step % 2 if kill % 2 else 0
        run.killed_after(step, chance.uniform(0.0, 0.1))
    run.finish()
