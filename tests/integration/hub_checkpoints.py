"""Trains with pushes to a Hub, then, from what was pushed, again; run by test_hub_checkpoints.py.

Usage: hub_checkpoints.py FOLDER, with HF_ENDPOINT set. Writes FOLDER/outcomes.json.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from resumable import AtSave, CutAfterSave, PowerCutError, callbacks_of, results_of, trainer_of
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_compress import last_complete_checkpoint, shrink

SAVE_STEPS = 3


class Dawdle(TrainerCallback):
    """Gives the upload, which runs in a thread, time to be there before the callbacks after this one."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.5)


def pushing(folder: Path, strategy: str) -> Trainer:
    return trainer_of(
        [Dawdle(), *callbacks_of("all")],
        folder / strategy,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_model_id=f"tester/{strategy}",
        hub_always_push=True,
        save_steps=SAVE_STEPS,
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    straight = trainer_of(callbacks_of("all"), folder / "straight", save_steps=SAVE_STEPS)
    straight.train()
    expected = results_of(straight)

    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        cut = pushing(folder, strategy)
        cut.add_callback(CutAfterSave(2 * SAVE_STEPS))
        try:
            cut.train()
        except PowerCutError:
            cut._finish_current_push()

    ended = pushing(folder, "end")
    ended.train()
    ended.push_to_hub(commit_message="trained")
    shrink(ended).push_to_hub("tester/small", commit_message="shrunk")
    loaded = {name: AutoModelForSequenceClassification.from_pretrained(f"tester/{name}") for name in ("end", "small")}
    trained = results_of(ended)

    outcomes: dict[str, Any] = {
        "end": [name for name, tensor in loaded["end"].state_dict().items() if not torch.equal(tensor, trained[name])],
        "parameters": {name: model.num_parameters() for name, model in loaded.items()},
    }
    for strategy, name in (("checkpoint", None), ("all_checkpoints", "checkpoint-3")):
        steps: list[int] = []
        local = snapshot_download(f"tester/{strategy}", local_dir=folder / f"{strategy}-download")
        resumed = trainer_of([*callbacks_of("all"), AtSave(steps.append)], folder / "resumed", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(Path(local) / name) if name else last_complete_checkpoint(local))
        found = results_of(resumed)
        outcomes[strategy] = {
            "steps": steps,
            "different": [key for key in expected if not torch.equal(expected[key], found[key])],
        }
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
