"""The life of a compression callback: find the Trainer, check it, install, save, resume, take off.

A subclass says what to install and what to store; when, is decided here.
"""

import functools
import json
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_compress.callbacks.access import (
    calling_trainer,
    gives_up_trial,
    plain_model,
    resumed_checkpoint,
    run_directory,
)
from hf_compress.callbacks.preview import Preview, count_steps, steps_per_epoch, unchanged
from hf_compress.callbacks.ranks import (
    check_same_on_all_ranks,
    fail_together,
    fingerprint,
    num_ranks,
)
from hf_compress.callbacks.session import Session, claim, take_off_leftovers
from hf_compress.callbacks.setup import check_setup
from hf_compress.callbacks.state import Section, check_config, check_resumable, read_state, write_state
from hf_compress.config import Config
from hf_compress.errors import CompressionError, TrainingError


@dataclass(frozen=True)
class Run:
    """What a callback knows once training begins."""

    model: PreTrainedModel
    """The model itself: never a DDP, compiled or PEFT wrapper."""

    args: TrainingArguments
    trainer: Trainer

    total_steps: int
    """Optimizer steps of the whole run, those before a resume included."""

    device: torch.device

    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of an epoch.

        Raises:
            TrainingError: If the data set has no length.
        """
        return steps_per_epoch(self.trainer)


class CompressionCallback(TrainerCallback):
    """Base of the pruning, quantization and distillation callbacks.

    Nothing is installed before ``on_train_begin``, which may come several times (a second ``train()``, a smaller
    batch size after running out of memory, a new model from ``model_init``): what an earlier begin left is taken off
    first. If anything fails while training begins or ends, all compression callbacks of the Trainer are taken off that
    have not finished.
    """

    section: ClassVar[str]
    """Key in the state files: ``"pruning"``, ``"quantization"`` or ``"distillation"``."""

    config: Config
    """Stored in checkpoints, and compared when training resumes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._run: Run | None = None
        self._run_directory = Path()
        self._trainer: weakref.ref[Trainer] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Name the Trainer; needed only where it is not found by itself (see the error that says so)."""
        self._trainer = weakref.ref(trainer)

    def _start(self, run: Run) -> None:
        """Check the config against the model, then install. May run again after ``_remove``."""
        raise NotImplementedError

    def _stop(self, run: Run) -> None:
        """Finish: check that the target was met, fold what is to stay, take off what must not."""
        self._remove()

    def _remove(self) -> None:
        """Take every instrument off, leaving the model plain.

        Called before every ``_start``, after a ``_start`` that failed halfway, and twice in a row.
        """
        raise NotImplementedError

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the tensors and the JSON facts that a checkpoint needs, the same on all ranks.

        Called on one rank only when a checkpoint is written.
        """
        return {}, {}

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what ``_state`` returned; tensors are on the CPU."""

    def _metrics(self) -> Mapping[str, float]:
        """Return what to add to the Trainer's training log; called on every rank, once per log."""
        return {}

    def _preview(self, run: Run) -> Mapping[str, Any]:
        """Return what there is to say about a run; called between ``_start`` and ``_remove``."""
        return {}

    def preview(self, trainer: Trainer) -> Preview:
        """Say what this callback is going to do, without training; see ``hf_compress.preview`` for all of them.

        Raises:
            TrainingError: If the Trainer has trained already, or the setup is one in which the callback would not do
                its work.
            CompressionError: Whatever else ``trainer.train()`` would raise at its begin.
        """
        if self._run is not None or trainer.state.global_step > 0:
            raise TrainingError(
                f"{type(self).__name__}.preview: the Trainer has trained already. Ask before trainer.train()."
            )
        self._check_alone(trainer)
        check_setup(trainer)
        run = Run(_model(trainer), trainer.args, trainer, count_steps(trainer), trainer.args.device)
        _free(trainer, run.model)
        try:
            with unchanged(run.model):
                self._start(run)
                return Preview(run.total_steps, {self.section: self._preview(run)})
        finally:
            self._remove()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the Trainer."""
        trainer = calling_trainer(self)
        if trainer is not None:
            self.attach(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the setup, install, and restore if training resumes.

        Raises:
            TrainingError: If the setup is one in which the callback would not do its work, or if the checkpoint
                cannot be resumed from.
        """
        self._take_off()
        trainer = self._find_trainer()
        try:
            with fail_together(args.device):
                self._check_alone(trainer)
                check_setup(trainer)
                self._run_directory = run_directory(trainer)
                run = Run(_model(trainer), args, trainer, state.max_steps, args.device)
                self._join(run)
                self._start(run)
                if state.global_step > 0:
                    folder = resumed_checkpoint(trainer)
                    self._read(folder, state.global_step)
                    check_resumable(folder)
            self._check_ranks_agree(run)
        except BaseException:
            _take_all_off(trainer)
            raise

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the callback, and those beside it, took part from the beginning and still do.

        Raises:
            TrainingError: If not.
        """
        self._session().check_complete()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state of all compression callbacks to the checkpoint, now that no rank writes to it any more.

        Raises:
            TrainingError: If the checkpoint is not where the Trainer saves by itself.
        """
        if self._run is None or self._session().members[0] is not self:
            return
        self._run.trainer.accelerator.wait_for_everyone()
        folder = self._run_directory / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and not folder.is_dir():
            raise TrainingError(
                f"{folder}: the Trainer saved a checkpoint elsewhere, so the compression state cannot be added to it. "
                "Do not override Trainer._save_checkpoint to use another folder."
            )
        if args.should_save:
            _write(self._run.trainer, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go back to the best checkpoint's state if the model did, then finish.

        A trial that a hyperparameter search gives up is only taken off: it cannot have met its target.

        Raises:
            TrainingError: If training began without this callback, or if the best checkpoint cannot be read.
        """
        session, run = self._session(), self._run
        assert run is not None
        if gives_up_trial(run.trainer):
            session.leave(self)
            self._take_off()
            return
        with fail_together(args.device):
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._read(Path(state.best_model_checkpoint), None)
            self._stop(run)
        self._check_ranks_agree(run)
        self._run = None
        session.leave(self)

    def _join(self, run: Run) -> None:
        """Take part in the run, which the first callback to do so opens."""
        session = Session.of(run.trainer)
        if session is None or session.state is not run.trainer.state:
            _free(run.trainer, run.model)
            session = Session(run.trainer, run.model, functools.partial(_write_early, run.trainer))
        session.join(self)
        self._run = run

    def _session(self) -> Session:
        session = Session.of(self._run.trainer) if self._run is not None else None
        if session is None:
            raise TrainingError(
                f"{type(self).__name__} was added after training had begun, so it did nothing. Pass it in "
                "Trainer(callbacks=[...]) or call trainer.add_callback before trainer.train()."
            )
        return session

    def _take_off(self) -> None:
        """Leave a run that failed, if there is one, and take off what the last one left."""
        self._run = None
        self._remove()

    def _run_failed(self) -> None:
        """Called after ``_stop`` if another compression callback does not come to its end."""

    def _find_trainer(self) -> Trainer:
        known = self._trainer() if self._trainer is not None else None
        trainer = calling_trainer(self) or known
        if trainer is None:
            raise TrainingError(
                f"{type(self).__name__} did not find the Trainer that runs it. Call callback.attach(trainer) before "
                "trainer.train()."
            )
        self.attach(trainer)
        return trainer

    def _check_alone(self, trainer: Trainer) -> None:
        if sum(other.section == self.section for other in _compression_callbacks(trainer)) > 1:
            raise TrainingError(
                f"the Trainer has two callbacks for {self.section}; allowed: one {type(self).__name__} per Trainer. "
                f"Remove one with trainer.remove_callback({type(self).__name__})."
            )

    def _check_ranks_agree(self, run: Run) -> None:
        if num_ranks() > 1:
            values = {
                "callbacks": str([other.section for other in _compression_callbacks(run.trainer)]),
                "config": json.dumps(self.config.to_dict(), sort_keys=True),
                "state": fingerprint(*self._state()),
            }
            check_same_on_all_ranks(values, f"{type(self).__name__}: callbacks, config or state", run.args.device)

    def _stored(self) -> Section:
        tensors, facts = self._state()
        return Section(self.config.to_dict(), tensors, facts)

    def _read(self, folder: Path, global_step: int | None) -> None:
        sections = read_state(folder, global_step)
        assert self._run is not None
        present = {other.section for other in _compression_callbacks(self._run.trainer)}
        if set(sections) != present:
            raise TrainingError(
                f"{folder}: saved with callbacks for {sorted(sections)}, but the Trainer has callbacks for "
                f"{sorted(present)}. Resume with the same callbacks, or start a new run from the checkpoint's weights."
            )
        stored = sections[self.section]
        check_config(folder, self.section, stored.config, self.config.to_dict())
        try:
            self._restore(stored.tensors, stored.facts)
        # What a state of other kind, shape or type leads to, wherever that shows.
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, CompressionError):
                raise
            raise TrainingError(
                f"{folder}: its state for {self.section} is not one that this callback has written ({error!r:.200}). "
                "Resume from another checkpoint, or start a new run from the checkpoint's weights."
            ) from error


def _model(trainer: Trainer) -> PreTrainedModel:
    model: Any = trainer.model
    return plain_model(model)


def _compression_callbacks(trainer: Trainer) -> list[CompressionCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CompressionCallback)]


def _write_early(trainer: Trainer, folder: Path) -> None:
    """Write the state while other ranks may still be saving; ``on_save`` writes it again."""
    args = trainer.args
    others = {f"rng_state_{rank}.pth" for rank in range(args.world_size) if rank != args.process_index}
    _write(trainer, folder, others)


def _write(trainer: Trainer, folder: Path, unfinished: Collection[str] = ()) -> None:
    sections = {each.section: each._stored() for each in _compression_callbacks(trainer) if each._run is not None}
    write_state(folder, trainer.state.global_step, sections, unfinished)


def _free(trainer: Trainer, model: PreTrainedModel) -> None:
    """Take off what earlier runs have left on the model, those of this Trainer's callbacks without a word."""
    _take_all_off(trainer)
    for callback in _compression_callbacks(trainer):
        callback._take_off()
    claim(model, trainer)
    take_off_leftovers(model)


def _take_all_off(trainer: Trainer) -> None:
    session = Session.of(trainer)
    if session is not None:
        session.take_off()
