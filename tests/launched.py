"""A training script as a user starts it; ``test_launchers.py`` does, and reads what it leaves in the folder given."""

import sys
from pathlib import Path
from typing import Any

import rank_runs
import torch
from accelerate import debug_launcher
from transformers import TrainerCallback


class DiesOnOneRank(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and rank_runs.rank() == 1:
            raise RuntimeError("power cut on rank 1")


def main(folder: str, how: str = "") -> None:
    torch.set_num_threads(1)
    callbacks = [rank_runs.pruning()]
    model = rank_runs.MODELS["bert"]()
    trainer, _ = rank_runs.make_trainer(model, rank_runs.examples("bert"), callbacks, Path(folder))
    if how == "dies":
        trainer.add_callback(DiesOnOneRank())
    trainer.train()
    assert len(callbacks[0].masks()) == 4
    (Path(folder) / f"rank{rank_runs.rank()}").write_text(str(trainer.accelerator.num_processes))


if __name__ == "__main__":
    if sys.argv[2:] == ["debug_launcher"]:
        debug_launcher(main, args=(sys.argv[1],), num_processes=2)
    else:
        main(*sys.argv[1:])
