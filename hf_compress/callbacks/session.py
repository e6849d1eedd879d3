"""One run of a Trainer, as its compression callbacks share it.

No event says that training ended with an exception, that a callback was removed, that a checkpoint is complete, or
what is about to be logged. So while a run is on, some methods of the Trainer are replaced on the instance.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import Trainer

from hf_compress.callbacks.access import replace_attribute, when_saved
from hf_compress.errors import TrainingError
from hf_compress.instruments.attach import detach_all
from hf_compress.instruments.finished import instrumented_modules, modules_with_final_gates

_ATTRIBUTE = "_hf_compress_session"


class Member(Protocol):
    """A callback that takes part in a run."""

    def _metrics(self) -> Mapping[str, float]:
        """Return what to add to the Trainer's training log."""
        ...

    def _take_off(self) -> None:
        """Leave a run that failed, with everything as it was before."""
        ...

    def _run_failed(self) -> None:
        """Take off what is of no use alone: this callback had finished, but another one of the run has not."""
        ...


class Session:
    """Opened by the first callback that begins, closed once the last has left.

    If training ends with an exception, all callbacks are taken off before it goes on its way, so that neither model
    nor teacher nor Trainer keeps anything. Exceptions that are caught inside the Trainer's loop do not end training.
    One that comes once the last callback has left, from somebody else's ``on_train_end``, finds the work done.

    Args:
        trainer: The Trainer, whose training begins.
        model: Its model, without wrappers.
        write: Called with each checkpoint folder once the Trainer has written its last file there.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, write: Callable[[Path], None]) -> None:
        self.trainer = trainer
        self.state = trainer.state
        """Every run has its own."""
        self.members: list[Member] = []
        self._finished: list[Member] = []
        self._is_complete = self.state.global_step >= self.state.max_steps
        self._depth = 0
        self._undo = ExitStack()
        vars(trainer)[_ATTRIBUTE] = self
        self._undo.callback(vars(trainer).pop, _ATTRIBUTE, None)
        claim(model, trainer)
        when_saved(trainer, self._if_complete(write), self._undo)
        replacements = [
            (trainer, "log", self._with_metrics(trainer.log)),
            (trainer, "_run_epoch", self._guarded(self._unless_complete(trainer._run_epoch))),
            (trainer, "_evaluate", self._guarded(trainer._evaluate)),
            (trainer, "_finalize_training", self._guarded(trainer._finalize_training)),
            (trainer.callback_handler, "on_epoch_begin", self._guarded(trainer.callback_handler.on_epoch_begin)),
        ]
        for owner, name, replacement in replacements:
            replace_attribute(owner, name, replacement, self._undo)

    @staticmethod
    def of(trainer: Trainer) -> "Session | None":
        """Return the session of a Trainer's run, if one is on."""
        return vars(trainer).get(_ATTRIBUTE)

    def join(self, member: Member) -> None:
        """Let a callback take part."""
        self.members.append(member)

    def leave(self, member: Member) -> None:
        """Let a callback that has finished go."""
        self.members = [each for each in self.members if each is not member]
        self._finished.append(member)
        if not self.members:
            self._finished.clear()  # the run is complete: whatever fails now, what it made stays
            self._undo.close()

    def take_off(self) -> None:
        """End the run for all callbacks, as if it had not begun; finished pruning, which is in the weights, stays."""
        members, self.members = self.members, []
        for member in members:
            member._take_off()
        for member in self._finished:
            member._run_failed()
        self._undo.close()

    def check_complete(self) -> None:
        """Check that the Trainer still has all callbacks that take part.

        Raises:
            TrainingError: If one was removed; all are then taken off.
        """
        present = self.trainer.callback_handler.callbacks
        gone = [member for member in self.members if not any(each is member for each in present)]
        if gone:
            self.take_off()
            raise TrainingError(
                f"{', '.join(type(each).__name__ for each in gone)} was removed while training was under way, so what "
                "it does would be unfinished. All compression callbacks were taken off. Remove callbacks before "
                "trainer.train(), or after it."
            )

    def _if_complete(self, write: Callable[[Path], None]) -> Callable[[Path], None]:
        def write_if_complete(folder: Path) -> None:
            self.check_complete()
            write(folder)

        return write_if_complete

    def _with_metrics(self, log: Callable[..., None]) -> Callable[..., None]:
        """Let the callbacks' metrics into the Trainer's training log.

        Not in ``on_log``: by then the log history and the reporting callbacks have their copies.
        """

        def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            # Only the Trainer's own training log has both, and every rank makes it, so metrics may be reduced.
            if "loss" in logs and "learning_rate" in logs:
                self.check_complete()
                for member in self.members:
                    logs.update(member._metrics())
            log(logs, *args, **kwargs)

        return log_with_metrics

    def _unless_complete(self, run_epoch: Callable[..., None]) -> Callable[..., None]:
        """Keep the Trainer from a step too many, which it does where a run that is resumed ended inside an epoch."""

        def run_epoch_if_any(*args: Any, **kwargs: Any) -> None:
            if self._is_complete:
                self.trainer.control.should_training_stop = True
            else:
                run_epoch(*args, **kwargs)

        return run_epoch_if_any

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Take everything off if a method ends with an exception that nothing in the training loop can catch."""

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                result = method(*args, **kwargs)
                self.check_complete()
                return result
            except BaseException:
                if self._depth == 1:
                    self.take_off()
                raise
            finally:
                self._depth -= 1

        return guarded


_sessions: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]]" = weakref.WeakKeyDictionary()
"""By models and teachers; a session that is still open when another Trainer claims its model was interrupted."""


def claim(model: nn.Module, trainer: Trainer) -> None:
    """Say that a Trainer's run, if one is on, works with a model or teacher; another's is over, with a warning."""
    known = _sessions.get(model)
    earlier, own = known() if known is not None else None, Session.of(trainer)
    if earlier is not None and earlier is not own and earlier.members:
        names = ", ".join(type(member).__name__ for member in earlier.members)
        earlier.take_off()
        warnings.warn(
            f"hf_compress: a training run of another Trainer with this {type(model).__name__} never ended. Its "
            f"callbacks ({names}) were taken off.",
            stacklevel=2,
        )
    if own is not None:
        _sessions[model] = weakref.ref(own)


def take_off_leftovers(model: nn.Module) -> None:
    """Free a model, from which a Trainer's callbacks have taken what is theirs, from what earlier runs left on it.

    Whatever is taken off draws a warning.

    Raises:
        TrainingError: If gates of a finished run are left, without which units that are gone would be back.
    """
    final = modules_with_final_gates(model)
    if final:
        raise TrainingError(
            f"the {type(model).__name__} carries the gates of a finished pruning run on {len(final)} modules (first: "
            f"{final[0]!r}), because its weights alone do not say what is gone. Call shrink(trainer) with the Trainer "
            "of that run first, and train what it returns."
        )
    left = instrumented_modules(model)
    if left:
        detach_all(model)
        warnings.warn(
            f"hf_compress: {len(left)} modules of the {type(model).__name__} (first: {left[0]!r}) carried fake "
            "quantizers, gates or masks of an earlier training run whose callback this Trainer does not have. They "
            "were taken off. To go on with quantization, pass a QuantizationCallback.",
            stacklevel=2,
        )
