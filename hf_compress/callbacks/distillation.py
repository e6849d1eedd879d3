"""Distillation inside a plain Trainer: the student's loss becomes (1 - alpha) * task + alpha * distillation.

A callback cannot change the loss, so it is mixed where it arises: in the model's outputs (a forward hook), or,
where the Trainer computes it from the outputs, in ``label_smoother`` or ``compute_loss_func``. Whatever the Trainer
does to the loss afterwards (accumulation, ranks, loss scaling) then applies to both terms alike.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_compress.callbacks.access import plain_model, replace_attribute
from hf_compress.callbacks.base import CompressionCallback, Run
from hf_compress.callbacks.item_count import CountProbe, gradient_says, loss_of_twice_as_many, values_say
from hf_compress.callbacks.preview import first_batch
from hf_compress.callbacks.ranks import all_reduce_mean
from hf_compress.callbacks.session import claim
from hf_compress.callbacks.teacher import (
    COMPUTED_INPUTS,
    check_inputs,
    check_teacher,
    digest,
    frozen,
    load_teacher,
    logits_of,
    teacher_logits,
)
from hf_compress.config import DistillationConfig
from hf_compress.distillation.losses import DistillationLoss
from hf_compress.distillation.positions import select_positions
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.attach import own_class
from hf_compress.registry import distillation_losses


class DistillationCallback(CompressionCallback):
    """Teaches the Trainer's model the outputs of a teacher.

    Evaluation is left alone: only forward passes in training mode with gradients are taught. The Trainer's logs gain
    ``task_loss`` and ``distillation_loss`` on the scale of ``loss``. A ``compute_loss_func`` is called once more on the
    first micro-batch, to find out whether it divides by ``num_items_in_batch``.

    Args:
        config: Weight, temperature and kind of the loss.
        teacher: A model, or the Hub name or folder of one, loaded when training begins. A model is moved to the
            training device and frozen while training runs.

    Raises:
        ConfigError: If either argument is of another type.
    """

    section = "distillation"
    config: DistillationConfig

    def __init__(self, config: DistillationConfig, teacher: PreTrainedModel | str | os.PathLike[str]) -> None:
        if not isinstance(config, DistillationConfig):
            raise ConfigError(f"DistillationCallback: config is a {type(config).__name__}; pass a DistillationConfig.")
        if not isinstance(teacher, nn.Module | str | os.PathLike):
            raise ConfigError(
                f"DistillationCallback: teacher is a {type(teacher).__name__}; allowed: a PreTrainedModel, or the Hub "
                "name or folder of one."
            )
        super().__init__(config)
        self.teacher = teacher
        self._installed = ExitStack()
        self._mixer: _Mixer | None = None
        self._teacher_digest = ""

    def _start(self, run: Run) -> None:
        teacher = self._ready_teacher(run)
        trainer, undo = run.trainer, self._installed
        undo.enter_context(frozen(teacher))
        self._teacher_digest = digest(plain_model(teacher))
        names = [name for name in ("label_smoother", "compute_loss_func") if getattr(trainer, name) is not None]
        mixer = self._mixer = _Mixer(self.config, teacher, run, names)
        # PEFT calls the base model's forward directly, so its hooks would not run: hook the Trainer's model.
        model: Any = trainer.model
        if names:
            hooks = [model.register_forward_hook(_eager(mixer.capture), with_kwargs=True)]
        else:
            hooks = [
                model.register_forward_pre_hook(_eager(mixer.place_probe), with_kwargs=True),
                model.register_forward_hook(_eager(mixer.mix_outputs), with_kwargs=True),
            ]
        for hook in hooks:
            undo.callback(hook.remove)
        for name in names:
            replace_attribute(trainer, name, mixer.mixed(getattr(trainer, name)), undo)

    def _remove(self) -> None:
        self._mixer = None
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

    def _metrics(self) -> Mapping[str, float]:
        return self._mixer.averages() if self._mixer is not None else {}

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return {}, {"teacher": self._teacher_digest}

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if facts.get("teacher") != self._teacher_digest:
            raise TrainingError(
                "DistillationCallback: the checkpoint's run had another teacher, or the same in another dtype. Resume "
                "with that teacher, or start a new run from the checkpoint's weights."
            )

    def _preview(self, run: Run) -> Mapping[str, Any]:
        mixer = self._mixer
        assert mixer is not None
        size = sum(parameter.numel() for parameter in mixer.teacher.parameters())
        facts: dict[str, Any] = {
            "teacher": f"{type(plain_model(mixer.teacher)).__name__}, {size:,} parameters",
            "loss": f"{1 - self.config.alpha:g} * task + {self.config.alpha:g} * {self.config.loss}",
            "temperature": self.config.temperature,
        }
        inputs = first_batch(run.trainer)
        model: Any = run.trainer.model
        with torch.no_grad(), torch.random.fork_rng(), run.trainer.accelerator.autocast():
            outputs = model(**inputs)  # no gradients, so the hooks leave it alone
            losses = mixer.per_position(outputs, inputs, inputs.get("labels"), mixer.shift)
        facts["distillation loss of the first batch"] = float(losses.mean())
        return facts

    def _ready_teacher(self, run: Run) -> nn.Module:
        """Return the teacher, checked, on the training device."""
        teacher: Any = self.teacher
        if isinstance(teacher, nn.Module):
            folder = plain_model(teacher, "the teacher").config._name_or_path or ""
            source = folder if os.path.isdir(folder) else ""
        else:
            source = os.fspath(teacher)
            teacher = load_teacher(source, run.model)
        plain = plain_model(teacher)
        claim(plain, run.trainer)
        check_teacher(plain, run.model, run.trainer.processing_class, source)
        # Quantized and dispatched models are where they have to be, and refuse to be moved.
        if not getattr(plain, "is_quantized", False) and getattr(plain, "hf_device_map", None) is None:
            teacher.to(run.device)
        module: nn.Module = teacher
        return module


class _Mixer:
    """Mixes the distillation loss into the task loss, and knows whether it was used."""

    def __init__(self, config: DistillationConfig, teacher: nn.Module, run: Run, mixes_in: list[str]) -> None:
        self.config = config
        self.teacher = teacher
        self.run = run
        self.loss: DistillationLoss = distillation_losses.get(config.loss)
        self.shift = _shifts_labels(run.model)
        self.per_item: bool | None = None
        """Whether the task loss is a sum divided by num_items_in_batch; None until a forward pass has shown it."""
        self.teacher_checked = False
        self.inputs_checked: set[str] = set()
        self.mixes_in = mixes_in
        """Names of what computes the loss outside the model."""
        self.inputs: Mapping[str, Any] | None = None
        self.num_computed = self.num_used = self.num_steps = 0
        self.sums = torch.zeros(2, device=run.device)
        """Task and distillation loss since the last log, scaled as the Trainer scales the loss."""

    def place_probe(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let the first forward pass show whether its loss depends on num_items_in_batch."""
        if not _is_training(module) or kwargs.get("num_items_in_batch") is None:
            return None
        num_items = kwargs["num_items_in_batch"]
        if self.per_item is not None:
            return None
        # A compiler would trace the subclass; the plain tensor's gradient says the same.
        compiled = self.run.args.torch_compile or getattr(module, "_compiled_call_impl", None) is not None
        probe = CountProbe.of(num_items, self.run.device)
        return args, {**kwargs, "num_items_in_batch": probe.as_subclass(Tensor) if compiled else probe}

    def capture(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        """Keep the inputs for a loss that is computed outside the model."""
        if _is_training(module):
            self.inputs = _keywords(args, kwargs)

    def mix_outputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Replace ``outputs.loss``."""
        if not _is_training(module):
            return None
        inputs = _keywords(args, kwargs)
        task_loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(task_loss, Tensor):
            raise TrainingError(
                f"distillation: {type(module).__name__} returned no loss to mix with (got a {type(outputs).__name__}). "
                "The data needs labels, return_dict must not be False, and an overridden Trainer.compute_loss must "
                "pass labels to the model and use outputs.loss; for your own loss use Trainer(compute_loss_func=...)."
            )
        labels, shift = kwargs.get("labels"), self.shift
        if kwargs.get("shift_labels") is not None:
            labels, shift = kwargs["shift_labels"], False
        num_items = kwargs.get("num_items_in_batch")
        if self.per_item is None and num_items is not None:
            self.per_item = gradient_says(task_loss, num_items)
            task_loss, num_items = task_loss.as_subclass(Tensor), num_items.detach().as_subclass(Tensor)
        outputs["loss"] = self._mix(task_loss, outputs, inputs, labels, shift, num_items)
        return outputs

    def mixed(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a ``label_smoother`` or ``compute_loss_func`` that distills as well."""

        def compute_mixed(outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> Tensor:
            inputs, self.inputs = self.inputs, None
            if inputs is None:
                return compute(outputs, labels, *args, **kwargs)
            if args:
                raise TrainingError(
                    "distillation: the Trainer's label_smoother or compute_loss_func was called with more than two "
                    "positional arguments. Pass num_items_in_batch and shift_labels by keyword in your compute_loss."
                )
            num_items, other = kwargs.get("num_items_in_batch"), None
            if self.per_item is None and num_items is not None:
                other = loss_of_twice_as_many(compute, outputs, labels, kwargs, self.run.device)
            task_loss = compute(outputs, labels, **kwargs)
            if other is not None:
                self.per_item = values_say(task_loss, other)
            return self._mix(task_loss, outputs, inputs, labels, self.shift, num_items)

        return compute_mixed

    def averages(self) -> dict[str, float]:
        """Return both losses per optimizer step since the last call, over all ranks."""
        task, distillation = (all_reduce_mean(self.sums) / max(self.num_steps, 1)).tolist()
        self.sums.zero_()
        self.num_steps = 0
        return {"task_loss": task, "distillation_loss": distillation}

    def end_step(self) -> None:
        """Check that distillation took part in this optimizer step."""
        if self.num_used == 0:
            raise TrainingError(f"distillation has no effect: {self._why_unused()}")
        self.num_computed = self.num_used = 0
        self.num_steps += 1

    def _why_unused(self) -> str:
        names = " and ".join(self.mixes_in)
        if self.num_computed == 0 and self.inputs is not None:
            return (
                f"the Trainer has {names}, where the distillation loss is added, but did not call it. "
                f"Trainer.compute_loss is probably overridden; make it use self.{self.mixes_in[0]}(outputs, labels), "
                "or set label_smoothing_factor=0 and no compute_loss_func and let it use outputs.loss."
            )
        reason = (
            "the loss that was differentiated does not contain it."
            if self.num_computed
            else "the model's forward was not called in training mode with gradients."
        )
        return (
            f"{reason} Trainer.compute_loss is probably overridden; make it call the model with labels and use "
            "outputs.loss, or use Trainer(compute_loss_func=...) instead."
        )

    def per_position(self, outputs: Any, inputs: Mapping[str, Any], labels: Any, shift: bool) -> Tensor:
        """Return the distillation loss of every position that counts, [num_positions]."""
        own = logits_of(outputs, "student")
        prefix = "decoder_" if self.run.model.config.is_encoder_decoder else ""
        mask = inputs.get(f"{prefix}attention_mask")
        student, teacher = select_positions(
            own, self._teach(inputs).to(own.device), labels=labels, attention_mask=mask, shift=shift
        )
        return self.loss(student, teacher, self.config.temperature)

    def _mix(
        self,
        task_loss: Tensor,
        outputs: Any,
        inputs: Mapping[str, Any],
        labels: Any,
        shift: bool,
        num_items: Any,
    ) -> Tensor:
        per_position = self.per_position(outputs, inputs, labels, shift)
        count = num_items if self.per_item and num_items is not None else max(len(per_position), 1)
        distillation_loss = per_position.sum() / count
        self._watch(task_loss.detach(), distillation_loss)
        alpha = self.config.alpha
        return (1 - alpha) * task_loss + alpha * distillation_loss

    def _teach(self, inputs: Mapping[str, Any]) -> Tensor:
        given = {name for name in COMPUTED_INPUTS if inputs.get(name) is not None}
        if given - self.inputs_checked:
            check_inputs(plain_model(self.teacher), self.run.model, {name: inputs[name] for name in given})
            self.inputs_checked = given
        with self.run.trainer.accelerator.autocast():
            logits = teacher_logits(self.teacher, self.run.model, inputs)
        if not self.teacher_checked:
            self.teacher_checked = True
            if bool(logits.isnan().any()):
                raise TrainingError(
                    "distillation: the teacher's logits are not numbers (NaN) on the first batch. Check its weights, "
                    "or load it with dtype=torch.float32."
                )
        return logits

    def _watch(self, task_loss: Tensor, distillation_loss: Tensor) -> None:
        """Count the use of the distillation loss when its gradient arrives, which shows the loss scale in force."""
        self.num_computed += 1
        losses = torch.stack([task_loss.float(), distillation_loss.detach().float()])

        def used(gradient: Tensor | None) -> None:
            # DDP passes None instead of not calling the hook.
            if gradient is None:
                return
            self.num_used += 1
            scaler = self.run.trainer.accelerator.scaler
            one = losses.new_ones(())
            loss_scale = scaler.scale(one) if scaler is not None else one  # get_scale() would wait for the device
            self.sums += losses * (gradient.detach().float() / (self.config.alpha * loss_scale))

        distillation_loss.register_hook(used)  # type: ignore[no-untyped-call]


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _keywords(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if args:
        raise TrainingError(
            "distillation: the model was called with positional arguments, which the teacher may order differently. "
            "Call model(**inputs) in your compute_loss."
        )
    return kwargs


def _shifts_labels(model: PreTrainedModel) -> bool:
    """Whether position i predicts the label at i + 1, by the rules the Trainer counts and smooths labels with."""
    if model.config.is_encoder_decoder:
        return False
    named = own_class(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return named or LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a hook out of torch.compile's graphs, which it would break into pieces."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled
