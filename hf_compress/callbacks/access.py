"""What a callback has to know about its Trainer and is not told by the events.

Transformers passes neither the Trainer nor the checkpoint being resumed from to callbacks, but both are local
variables of the functions that call them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_compress.errors import TrainingError
from hf_compress.instruments.adapters import without_wrapper


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that is calling this callback right now, or None."""
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(each is callback for each in owner.callback_handler.callbacks):
            return owner
    return None


def run_directory(trainer: Trainer) -> Path:
    """Return the folder that the run's checkpoints go to; hyperparameter searches have one per trial."""
    return Path(trainer._get_output_dir(_trainer_local(trainer, "trial")))


def resumed_checkpoint(trainer: Trainer) -> Path:
    """Return the checkpoint folder that training resumes from; called while ``train()`` begins.

    Raises:
        TrainingError: If there is no such folder.
    """
    default = run_directory(trainer) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    given = (_trainer_local(trainer, "resume_from_checkpoint"), trainer.args.resume_from_checkpoint, default)
    folders = [Path(path) for path in given if isinstance(path, str | os.PathLike)]
    for folder in folders:
        if folder.is_dir():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise TrainingError(
        f"training resumes at step {trainer.state.global_step}, but its checkpoint folder was not found (looked for "
        f"{looked}). Call trainer.train(resume_from_checkpoint=<folder>)."
    )


def gives_up_trial(trainer: Trainer) -> bool:
    """Return whether a hyperparameter search is just ending a trial that is not worth going on with.

    The Trainer then calls ``on_train_end`` in the middle of training, and leaves training with an exception.
    """
    return any(f.f_code.co_name == "_report_to_hp_search" and f.f_locals.get("self") is trainer for f in _frames())


def when_saved(trainer: Trainer, write: Callable[[Path], None], undo: ExitStack) -> None:
    """Have ``write`` called with each checkpoint folder once the Trainer has written its last file there.

    Events come too late: the Trainer uploads the checkpoint and deletes older ones, perhaps the last that are
    complete, before ``on_save``.
    """
    state, save = trainer.state, type(trainer.state).save_to_json

    def save_to_json(json_path: str) -> None:
        save(state, json_path)
        folder = Path(json_path).parent
        if folder == run_directory(trainer) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}":
            write(folder)

    replace_attribute(state, "save_to_json", save_to_json, undo)


def replace_attribute(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an instance attribute; ``undo`` brings back what was there, unless somebody else has replaced it since."""
    had, old = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)

    def bring_back() -> None:
        if vars(owner).get(name) is not value:
            return
        if had:
            setattr(owner, name, old)
        else:
            delattr(owner, name)

    undo.callback(bring_back)


def plain_model(model: nn.Module, who: str = "the Trainer's model") -> PreTrainedModel:
    """Return the Transformers model itself: the base model, adapters included, where PEFT wraps it.

    Raises:
        TrainingError: If it is anything but a PreTrainedModel.
    """
    base = without_wrapper(model)
    if not isinstance(base, PreTrainedModel):
        raise TrainingError(f"{who} is a {type(base).__name__}; allowed: a transformers PreTrainedModel.")
    return base


def loss_scale(optimizer: Any) -> float:
    """Return the fp16 loss scale: the Trainer unscales its own parameters' gradients only."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def refuse_prompts(model: Any) -> None:
    """Check that PEFT does not feed the model with prompts, which no mask covers and no merging removes.

    Raises:
        TrainingError: If it does.
    """
    if isinstance(model, PeftModel) and any(each.is_prompt_learning for each in model.peft_config.values()):
        raise TrainingError(
            f"the {type(model).__name__} learns prompts or prefixes, which no mask covers; allowed: LoRA. "
            "Prune the model first and learn prompts for the result."
        )


def _trainer_local(trainer: Trainer, name: str) -> Any:
    """Return the innermost non-None local variable of that name in the Trainer's methods under way, or None."""
    for frame in _frames():
        if frame.f_locals.get("self") is trainer and frame.f_locals.get(name) is not None:
            return frame.f_locals[name]
    return None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
