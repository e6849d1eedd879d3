"""Distillation inside a plain Trainer: the student's loss becomes (1 - alpha) * task + alpha * distillation.

A callback cannot change the loss, so it is mixed where it arises: in the model's outputs (a forward hook), or,
where the Trainer computes it from the outputs, in ``label_smoother`` or ``compute_loss_func``. Whatever the Trainer
does to the loss afterwards (accumulation, ranks, loss scaling) then applies to both terms alike.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.access import calling_trainer, loss_scale, replace_attribute
from hf_compress.callbacks.base import CompressionCallback, Run
from hf_compress.callbacks.cached_teacher import CachedTeacher
from hf_compress.callbacks.ensemble import Ensemble, frozen_models
from hf_compress.callbacks.feature_distillation import FeatureDistillation
from hf_compress.callbacks.heads import head_of
from hf_compress.callbacks.mixing import LossListener, Mixer, computes_as_usual, is_compiled
from hf_compress.callbacks.preview import first_batch
from hf_compress.callbacks.ramps import check_windows
from hf_compress.callbacks.randomness import differs_in_training
from hf_compress.callbacks.same_task import check_padding
from hf_compress.callbacks.teachers import (
    SELF,
    UNMASKED,
    Teacher,
    UnmaskedStudent,
    copy_of,
    ready_teacher,
)
from hf_compress.config import DistillationConfig, Ramp
from hf_compress.config.distillation import AUTO, TEMPERATURE
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.manifest import MANIFEST

Source = PreTrainedModel | TeacherCache | str | os.PathLike[str]
"""A model, the Hub name or folder of one, or what was cached of one."""


class DistillationCallback(CompressionCallback):
    """Teaches the Trainer's model the outputs of a teacher.

    Evaluation is left alone: only forward passes in training mode with gradients are taught. The Trainer's logs gain
    ``task_loss`` and ``distillation_loss`` on the scale of ``loss``, and each part of the latter where it has several.
    A ``compute_loss_func`` is called once more on the first micro-batch, to find out whether it divides by
    ``num_items_in_batch``.

    Args:
        config: Losses, their weights and the temperature.
        teacher: A model, or the Hub name or folder of one (of a PEFT adapter, too), loaded when training begins. A
            model is moved to the training device and frozen while training runs. Several in a list teach together:
            their logits are averaged. ``"self"`` is a frozen copy of the student, made when the Trainer was: the
            dense model. ``"unmasked"`` is the student of the same step without masks, fake quantization and dropout,
            which needs no memory for a copy. A ``TeacherCache``, or its folder, answers from disk what its teacher
            said before (``cache_teacher_outputs``). Teachers are never saved.

    Raises:
        ConfigError: If an argument is of another type, or a setting of the config has no effect on the teacher.
    """

    section = "distillation"
    config: DistillationConfig

    def __init__(self, config: DistillationConfig, teacher: Source | Sequence[Source]) -> None:
        if not isinstance(config, DistillationConfig):
            raise ConfigError(f"DistillationCallback: config is a {type(config).__name__}; pass a DistillationConfig.")
        several: list[Any] = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        if not several:
            raise ConfigError("DistillationCallback: teacher is an empty list; pass at least one teacher.")
        for each in several:
            if not isinstance(each, nn.Module | TeacherCache | str | os.PathLike):
                raise ConfigError(
                    f"DistillationCallback: teacher is a {type(each).__name__}; allowed: a PreTrainedModel, the Hub "
                    f"name or folder of one, a TeacherCache or its folder, {SELF!r}, {UNMASKED!r}, or a list of these."
                )
            if each == "":
                raise ConfigError(
                    "DistillationCallback: teacher is an empty text; allowed: the Hub name or folder of a model, "
                    f"{SELF!r} or {UNMASKED!r}."
                )
        _check_effect(config, several)
        super().__init__(config)
        self.teacher = teacher
        """As it was given."""

        self.listeners: list[LossListener] = []
        """Are told of the loss of the logits, and of its gradient."""
        self._sources = several
        self._copy: nn.Module | None = None
        self._installed = ExitStack()
        self._mixer: Mixer | None = None
        self._rehearsed: Mapping[str, Tensor] | None = None
        """Losses of the first batch, if it was compared before training."""
        self._teacher_digest = ""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Copy the model, if it is to teach itself: it may come from a checkpoint once training begins."""
        super().on_init_end(args, state, control, **kwargs)
        trainer = calling_trainer(self)
        if SELF in self._sources and trainer is not None:
            model: Any = trainer.model
            self._copy = copy_of(model, self.config)

    def _start(self, run: Run) -> None:
        check_windows(self.config, run)
        teacher = self._ready_teacher(run)
        if self.config.padded_vocabulary:
            check_padding(teacher.vocabulary_sizes(), run.model)
        if self.config.loss == AUTO and self.config.temperature != TEMPERATURE and head_of(run.model).is_regression():
            raise ConfigError(
                f"DistillationConfig.temperature: got {_text(self.config.temperature)}; allowed: {TEMPERATURE}, since "
                f"the student is a {type(run.model).__name__} for regression, whose loss (mse) has no temperature."
            )
        trainer, undo = run.trainer, self._installed
        undo.enter_context(frozen_models(teacher))
        self._teacher_digest = teacher.fingerprint()
        features = FeatureDistillation(self.config.features, run) if self.config.features else None
        names = [name for name in ("label_smoother", "compute_loss_func") if getattr(trainer, name) is not None]
        if names == ["label_smoother"] and head_of(run.model).labels_argument != "labels":
            names = []  # the Trainer has it, and does not call it
        mixer = self._mixer = Mixer(self.config, teacher, run, names, features)
        if features is not None:
            undo.callback(features.tap.close)  # KeyboardInterrupt runs no hook
            features.tap.check_checkpointing()
        self._rehearse(run, mixer)
        mixer.listeners = self.listeners
        # PEFT calls the base model's forward directly, so its hooks would not run: hook the Trainer's model.
        model: Any = trainer.model
        hooks = [
            model.register_forward_pre_hook(_eager(mixer.begin_pass), with_kwargs=True),
            model.register_forward_hook(_eager(mixer.end_pass), with_kwargs=True, always_call=True),
        ]
        for hook in hooks:
            undo.callback(hook.remove)
        for name in names:
            replace_attribute(trainer, name, mixer.mixed(getattr(trainer, name)), undo)

    def _rehearse(self, run: Run, mixer: Mixer) -> None:
        """Compare the first batch, unless the model may get something else than the batch, or would be compiled for it.

        Of a stream, which would lose it, features are prepared when training gets there.
        """
        trainer: Any = run.trainer
        as_usual = computes_as_usual(trainer) and not is_compiled(run)
        batch = first_batch(trainer) if mixer.features is not None or as_usual else None
        if batch is not None:
            self._rehearsed = mixer.rehearse(batch)
        elif mixer.features is not None and trainer.is_fsdp_enabled:
            raise TrainingError(
                "distillation: features are prepared on the first batch, which a stream (an IterableDataset) under "
                "FSDP would lose. Use a data set with __getitem__ and __len__, or DDP."
            )

    def _remove(self) -> None:
        self._mixer = self._rehearsed = None
        self._installed.close()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the distillation loss took part in the step.

        Raises:
            TrainingError: If it was not computed, or if no gradient came back through it.
        """
        if self._mixer is not None:
            self._mixer.end_step()
            if self._mixer.features is not None:
                self._mixer.features.projections.step(loss_scale(kwargs.get("optimizer")))

    def _metrics(self) -> Mapping[str, float]:
        return self._mixer.averages() if self._mixer is not None else {}

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        if self._mixer is not None:
            self._mixer.check()  # what it has spoiled should not be saved
        features = self._mixer.features if self._mixer is not None else None
        return features.projections.state() if features is not None else {}, {"teacher": self._teacher_digest}

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if facts.get("teacher") != self._teacher_digest:
            raise TrainingError(
                "DistillationCallback: the checkpoint's run had another teacher, or the same in another dtype. Resume "
                "with that teacher, or start a new run from the checkpoint's weights."
            )
        if self._mixer is not None and self._mixer.features is not None:
            self._mixer.features.restore(tensors)

    def _preview(self, run: Run) -> Mapping[str, Any]:
        mixer = self._mixer
        assert mixer is not None
        facts: dict[str, Any] = {"teacher": mixer.teacher.describe(), "alpha": _text(self.config.alpha)}
        if self.config.uses_temperature():
            facts["temperature"] = _text(self.config.temperature)
        if self._rehearsed is None and (batch := first_batch(run.trainer)) is not None:
            self._rehearsed = mixer.rehearse(batch)
        for name, loss in (self._rehearsed or {}).items():
            facts[f"{name} loss of the first batch"] = float(loss)
        return facts

    def _ready_teacher(self, run: Run) -> Teacher:
        """Return the teacher, checked, on its device."""
        members = [self._ready(source, run) for source in self._sources]
        if len(members) == 1:
            return members[0]
        return Ensemble(members, ordered=bool(self.config.features), padded=self.config.padded_vocabulary)

    def _ready(self, source: Any, run: Run) -> Teacher:
        trainer: Any = run.trainer
        if _is_cache(source):
            opened = source if isinstance(source, TeacherCache) else TeacherCache.open(source)
            return CachedTeacher(opened, self.config, run)
        wants = FeatureDistillation.wants(self.config.features)
        if source == UNMASKED:
            others = [each for each in trainer.callback_handler.callbacks if isinstance(each, CompressionCallback)]
            if others == [self] and not trainer.is_fsdp_enabled and not _teaches_itself(run):
                raise ConfigError(
                    f"DistillationCallback: teacher={UNMASKED!r}, but no callback masks or quantizes, and there is no "
                    "dropout, so the student would teach itself what it says. Add a PruningCallback or "
                    f"QuantizationCallback, or use teacher={SELF!r}."
                )
            if trainer.is_fsdp_enabled:
                raise TrainingError(f"distillation: teacher={UNMASKED!r} does not work under FSDP; use {SELF!r}.")
            return UnmaskedStudent(trainer.model, run.model, trainer, wants)
        if source == SELF:
            if self._copy is None:
                if trainer.state.global_step > 0:
                    raise TrainingError(
                        f"distillation: teacher={SELF!r} copies the model when the Trainer is made, but this callback "
                        "was added later, and training resumes. Pass it in Trainer(callbacks=[...])."
                    )
                self._copy = copy_of(trainer.model, self.config)
            source = self._copy
        return ready_teacher(source, self.config, run.model, trainer, wants)


def _check_effect(config: DistillationConfig, sources: list[Any]) -> None:
    """Check that the settings of the teacher have an effect."""
    named = [each for each in sources if not isinstance(each, nn.Module) and not _is_cache(each) and each != UNMASKED]
    if config.teacher_dtype is not None and not named:
        raise ConfigError(
            f"DistillationConfig.teacher_dtype: got {config.teacher_dtype!r}, but the teacher is a cache or a model "
            f"that is there already; allowed: None. Load it with that dtype, or pass its name or {SELF!r}."
        )
    computing = [each for each in sources if isinstance(each, nn.Module) or each in named]
    if config.teacher_device is not None and not computing:
        raise ConfigError(
            f"DistillationConfig.teacher_device: got {config.teacher_device!r}; allowed: None where the teacher is the "
            "student itself or a cache."
        )


def _teaches_itself(run: Run) -> bool:
    """Return whether a student says something else while it trains, as far as that can be tried."""
    return differs_in_training(run.model, first_batch(run.trainer) if computes_as_usual(run.trainer) else None)


def _is_cache(source: Any) -> bool:
    """Return whether a teacher is what was cached of one, or the folder of that."""
    if isinstance(source, str | os.PathLike):
        return (Path(source) / MANIFEST).is_file()
    return isinstance(source, TeacherCache)


def _text(number: float | Ramp) -> Any:
    if not isinstance(number, Ramp):
        return number
    return f"{number.start:g} to {number.stop:g}, {number.schedule}, from {number.begin} to {number.end}"


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a hook out of torch.compile's graphs, which it would break into pieces."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled
