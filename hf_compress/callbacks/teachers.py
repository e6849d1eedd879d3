"""Who teaches: a model, a copy of the student, or the student itself without its masks."""

import copy
import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hf_compress.callbacks.access import plain_model
from hf_compress.callbacks.heads import Head
from hf_compress.callbacks.same_task import Task
from hf_compress.callbacks.session import claim
from hf_compress.callbacks.teacher import (
    COMPUTED_INPUTS,
    check_inputs,
    check_teacher,
    digest,
    load_teacher,
    taught_inputs,
)
from hf_compress.config import DistillationConfig
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.attach import attachment_of, suspended
from hf_compress.instruments.features import Features, FeatureTap
from hf_compress.teachers.inputs import in_precision_of
from hf_compress.teachers.outputs import SparseLogits

logger = logging.get_logger(__name__)

SELF = "self"
"""Teacher: a frozen copy of the student, made when the Trainer was."""

FIRST_STEPS = 2
"""Optimizer steps after which a teacher's numbers are checked at once, later only where the device is waited for."""

UNMASKED = "unmasked"
"""Teacher: the student as it is, without masks, fake quantization and dropout; it needs no memory."""

STUDENT = (SELF, UNMASKED)
"""Teachers that are no models of their own."""


@dataclass(frozen=True)
class Lesson:
    """What a teacher says to a batch."""

    logits: Tensor | SparseLogits | None
    """Of the student's shape, but for tokens that padding adds to either; None if only features are compared."""

    known: Tensor | None = None
    """Positions that the teacher speaks of, bool, [batch, length]; None if it speaks of all."""

    features: tuple[Features, ...] = ()
    """Of each model that teaches, if features are compared."""


class Teacher(Protocol):
    """Answers the inputs of the student."""

    def teach(self, inputs: Mapping[str, Any], head: Head, labels: Any = None) -> Lesson:
        """Return what it says.

        Args:
            inputs: Keyword arguments that the student was called with.
            head: Reads its outputs.
            labels: Of the batch, also where the Trainer took them out of ``inputs``.

        Raises:
            TrainingError: If it cannot be asked, or says nothing of use.
        """
        ...

    def end_step(self) -> None:
        """Check, at the end of an optimizer step, what was not worth waiting for before.

        Raises:
            TrainingError: If something went wrong in the step.
        """
        ...

    def check(self) -> None:
        """Check all that was put off; called where the device is waited for anyway.

        Raises:
            TrainingError: If something went wrong since the last time.
        """
        ...

    def vocabulary_sizes(self) -> tuple[int | None, ...]:
        """Return how many tokens each model that teaches has; None where its config does not say."""
        ...

    def fingerprint(self) -> str:
        """Return a text that tells teachers apart."""
        ...

    def describe(self) -> str:
        """Return what it is, for people."""
        ...


class LiveTeacher:
    """A model that computes its answers, in eval mode, without gradients, under the Trainer's autocast.

    Args:
        model: The model, wrappers included.
        student: The model that learns, without wrappers.
        trainer: Its Trainer.
        wants: What a ``FeatureTap`` takes from it; nothing by default.
        speaks: Whether its logits are compared; if not, it may have another head, or none.
    """

    def __init__(
        self,
        model: nn.Module,
        student: PreTrainedModel,
        trainer: Trainer,
        wants: Collection[str] = (),
        speaks: bool = True,
    ) -> None:
        self.model = model
        self.plain = plain_model(model, "the teacher")
        self.student = student
        self.trainer = trainer
        self._tap = FeatureTap(model, wants) if wants else None
        self._speaks = speaks
        self._inputs_checked: set[str] = set()
        self._largest: Tensor | None = None
        """The largest number it has said since it was last checked; NaN if any was none."""
        self._num_steps = 0

    def teach(self, inputs: Mapping[str, Any], head: Head, labels: Any = None) -> Lesson:
        """Run the model."""
        given = {name for name in COMPUTED_INPUTS if inputs.get(name) is not None}
        if given - self._inputs_checked:
            check_inputs(self.plain, self.student, {name: inputs[name] for name in given})
            self._inputs_checked = given
        taken = moved(taught_inputs(self.plain, self.student, inputs), self.plain)
        features: tuple[Features, ...] = ()
        with torch.no_grad(), self.trainer.accelerator.autocast():
            if self._tap is None:
                outputs = self._asked(taken)
            else:
                with closing(self._tap):
                    outputs = self._asked(self._tap.prepare(taken))
                    features = (self._tap.read(outputs),)
        logits = head.logits(outputs, taken, "teacher") if self._speaks else None
        self._notice(logits, features)
        return Lesson(logits, features=features)

    def _notice(self, logits: Tensor | None, features: Sequence[Features]) -> None:
        """Remember the largest number, without waiting for it; -inf among logits excludes a class."""
        with torch.no_grad():
            seen = [torch.linalg.vector_norm(x, torch.inf) for each in features for x in each.tensors()]
            seen += [logits.amax()] if logits is not None and logits.numel() else []
            seen += [self._largest] if self._largest is not None else []
            if seen:
                self._largest = torch.stack([x.float() for x in seen]).amax()

    def end_step(self) -> None:
        """Check the first steps."""
        self._num_steps += 1
        if self._num_steps <= FIRST_STEPS:
            self.check()

    def check(self) -> None:
        """Check that all it has said since the last check were numbers; waits for the device.

        Raises:
            TrainingError: If not.
        """
        largest, self._largest = self._largest, None
        if largest is not None and not float(largest) < float("inf"):
            raise TrainingError(
                f"distillation: the teacher ({self.describe()}) gave NaN or infinite values. Check its weights, or "
                "load it with dtype=torch.float32; if its outputs were right before, go back to an earlier checkpoint."
            )

    def vocabulary_sizes(self) -> tuple[int | None, ...]:
        """Return that of the model."""
        return (Task.of(self.plain.config).vocab_size,)

    def fingerprint(self) -> str:
        """Return a digest of the model's parameters."""
        return digest(self.plain)

    def describe(self) -> str:
        """Return class and size."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{type(self.plain).__name__}, {size:,} parameters"

    def _asked(self, inputs: Mapping[str, Any]) -> Any:
        try:
            return self._run(inputs)
        except (RuntimeError, IndexError) as error:
            reason = self._too_long(inputs)
            if reason is None and isinstance(error, IndexError):  # only CPUs can be asked after such a failure
                reason = self._unknown_token(inputs)
            if reason is None:
                raise
            raise TrainingError(f"distillation: the teacher ({self.describe()}) has {reason}") from error

    def _too_long(self, inputs: Mapping[str, Any]) -> str | None:
        limit = getattr(self.plain.config.get_text_config(), "max_position_embeddings", None)
        ids = inputs.get("input_ids")
        if not isinstance(limit, int) or not isinstance(ids, Tensor) or ids.shape[-1] <= limit:
            return None
        return (
            f"{limit} positions, but texts of this batch are {ids.shape[-1]} tokens long. Cut them "
            f"(max_length={limit} of the tokenizer), or use another teacher."
        )

    def _unknown_token(self, inputs: Mapping[str, Any]) -> str | None:
        (size,) = self.vocabulary_sizes()
        for name in ("input_ids", "decoder_input_ids"):
            ids = inputs.get(name)
            if size is not None and isinstance(ids, Tensor) and ids.numel() and int(ids.max()) >= size:
                return (
                    f"a vocabulary of {size} tokens, but {name} of this batch contain {int(ids.max())}. Use a teacher "
                    "with the student's tokenizer."
                )
        return None

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**inputs)


class UnmaskedStudent(LiveTeacher):
    """The student as it is in this step, without masks, fake quantization and dropout."""

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        with suspended(self.model), _in_eval_mode(self.model):
            return self.model(**inputs)

    def fingerprint(self) -> str:
        """Return what it is: its weights are those of the checkpoint."""
        return UNMASKED

    def describe(self) -> str:
        """Return what it is."""
        return "the student without its masks"


def copy_of(model: nn.Module, config: DistillationConfig) -> nn.Module:
    """Return a copy of a student that nothing is attached to yet.

    Raises:
        TrainingError: If masks or quantizers are on it.
    """
    if any(attachment_of(module) is not None for module in model.modules()):
        raise TrainingError(
            f"distillation: teacher={SELF!r} copies the model before it is compressed, but something is attached to it "
            "already. Pass the callback in Trainer(callbacks=[...]), or teacher=copy.deepcopy(model) made before."
        )
    made = copy.deepcopy(model)
    return made if config.teacher_dtype is None else made.to(getattr(torch, config.teacher_dtype))


def ready_teacher(
    given: Any, config: DistillationConfig, student: PreTrainedModel, trainer: Trainer, wants: Collection[str] = ()
) -> LiveTeacher:
    """Return a teacher, checked, where it has to compute.

    Args:
        given: A model, or the Hub name or folder of one.
        config: Says where it computes, and in what.
        student: The model to be taught, without wrappers.
        trainer: Its Trainer.
        wants: What a ``FeatureTap`` takes from it.

    Raises:
        TrainingError: If it cannot be loaded, or cannot teach this student.
    """
    if isinstance(given, nn.Module):
        model: Any = given
        folder = plain_model(model, "the teacher").config._name_or_path or ""
        source = folder if os.path.isdir(folder) else ""
    else:
        source = os.fspath(given)
        model = load_teacher(source, student, config.teacher_dtype)
    plain = plain_model(model)
    claim(plain, trainer)
    speaks = config.loss is not None
    padded = config.padded_vocabulary
    check_teacher(plain, student, trainer.processing_class, source, same_task=speaks, padded=padded)
    _warn_of_lost_inputs(plain, student, trainer)
    _move(model, plain, config.teacher_device, trainer.args.device)
    return LiveTeacher(model, student, trainer, wants, speaks)


def _warn_of_lost_inputs(teacher: PreTrainedModel, student: PreTrainedModel, trainer: Trainer) -> None:
    """Say so where the Trainer drops columns that only the teacher reads."""
    columns = set(getattr(trainer.train_dataset, "column_names", None) or ())
    known, own = (set(inspect.signature(type(each).forward).parameters) for each in (teacher, student))
    lost = sorted((columns & known) - own - {"labels"})
    if lost and trainer.args.remove_unused_columns:
        logger.warning(
            f"distillation: the teacher reads {', '.join(lost)}, which the Trainer drops because the student does not: "
            "the teacher is asked without. Use a teacher that reads what the student does, or cache its outputs."
        )


def _move(model: nn.Module, plain: PreTrainedModel, wanted: str | None, device: torch.device) -> None:
    """Quantized and dispatched models are where they have to be, and refuse to be moved."""
    if getattr(plain, "is_quantized", False) or getattr(plain, "hf_device_map", None) is not None:
        if wanted is not None:
            raise ConfigError(
                f"DistillationConfig.teacher_device: got {wanted!r}, but the teacher is quantized or loaded with a "
                "device_map, and stays where it is; allowed: None. Load it there."
            )
        return
    try:
        model.to(wanted or device)
    except NotImplementedError as error:
        raise TrainingError(
            f"distillation: the teacher ({type(plain).__name__}) has weights without values, on the meta device. Load "
            "it with from_pretrained, or give its name or folder."
        ) from error
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without that kind of device
        if wanted is None:
            raise
        raise TrainingError(
            f"distillation: the teacher cannot be moved to teacher_device={wanted!r}: {error} Give a device that is "
            "there, or None."
        ) from error


def moved(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return inputs with all tensors on a model's device, images and sounds in its precision if that is half."""
    placed = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return in_precision_of(model, placed)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
