"""Mixes the distillation loss into the task loss where that arises, and knows whether it was used."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_compress.callbacks.base import Run
from hf_compress.callbacks.feature_distillation import FeatureDistillation
from hf_compress.callbacks.heads import Head, head_of
from hf_compress.callbacks.item_count import CountProbe, gradient_says, loss_of_twice_as_many, values_say
from hf_compress.callbacks.logit_terms import sum_of_losses
from hf_compress.callbacks.preview import unchanged
from hf_compress.callbacks.ramps import value_at
from hf_compress.callbacks.ranks import all_reduce_mean
from hf_compress.callbacks.teachers import Teacher
from hf_compress.config import DistillationConfig
from hf_compress.errors import TrainingError
from hf_compress.instruments.features import Features
from hf_compress.teachers.inputs import IGNORED_LABEL

LossListener = Callable[[Tensor, Tensor], None]
"""(loss of the logits, the gradient that arrives at it): called in the backward pass, before it goes on."""


class Mixer:
    """Makes (1 - alpha) * task + alpha * distillation of the task loss.

    Args:
        config: Losses and their weights.
        teacher: Who is asked.
        run: The run.
        mixes_in: Names of what computes the loss outside the model, such as ``"label_smoother"``.
        features: Compares what is inside of the models; None if only logits are.
    """

    def __init__(
        self,
        config: DistillationConfig,
        teacher: Teacher,
        run: Run,
        mixes_in: list[str],
        features: FeatureDistillation | None = None,
    ) -> None:
        self.config = config
        self.teacher = teacher
        self.run = run
        self.features = features
        self.head: Head = head_of(run.model)
        self.listeners: list[LossListener] = []
        self.per_item: bool | None = None
        """Whether the task loss is a sum divided by num_items_in_batch; None until a forward pass has shown it."""
        self.mixes_in = mixes_in
        self.inputs: Mapping[str, Any] | None = None
        self.taken: Features | None = None
        """Inputs and features of a pass whose loss is computed outside the model."""
        self.num_computed = self.num_used = self.num_steps = 0
        self.gradients: Tensor | None = None
        """Sum of the magnitudes of the gradients that have arrived in the first step."""
        self.was_checked = False
        self._unanswered: Tensor | None = None
        """How many positions counted of which the teacher says nothing."""
        self.sums: dict[str, Tensor] = {}
        """By name, losses since the last log, scaled as the Trainer scales the loss."""

    def rehearse(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compare a batch as training will, so that errors come before it, and make projections; for all ranks.

        Args:
            batch: As the Trainer gets it, or as the model does.

        Returns:
            Every loss by name.

        Raises:
            ConfigError: If a setting does not fit the models, or has no effect.
            TrainingError: If outputs are missing or do not fit each other.
        """
        model: Any = self.run.trainer.model
        labels, shift = self._labels(batch)
        inputs = dict(batch)
        if self.mixes_in:
            inputs.pop("labels", None)  # as the Trainer does
        if self.run.trainer.model_accepts_loss_kwargs and isinstance(labels, Tensor):
            inputs["num_items_in_batch"] = labels.ne(IGNORED_LABEL).sum()
        with torch.no_grad(), unchanged(model), torch.random.fork_rng(), self.run.trainer.accelerator.autocast():
            model.eval()  # so that the hooks leave it alone
            outputs, taken = self._watched(model, inputs)
            if not self.mixes_in and computes_as_usual(self.run.trainer):
                _task_loss(model, outputs)
            found = self.losses(outputs, inputs, labels, shift, None, taken)
        self.check()
        if self.features is not None:
            self.features.forget_masks()
        return found

    def begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a forward pass: watch its features, and let the first show whether its loss depends on a count."""
        if not _is_training(module):
            return None
        if self.features is not None:
            if not self.features.is_ready and not self.mixes_in:  # those wait for the labels
                self.rehearse(_keywords(args, kwargs))
            kwargs = self.features.tap.prepare(kwargs)
        if self.mixes_in or self.per_item is not None or kwargs.get("num_items_in_batch") is None:
            return args, kwargs
        # A compiler would trace the subclass; the plain tensor's gradient says the same.
        probe = CountProbe.of(kwargs["num_items_in_batch"], self.run.device)
        return args, {**kwargs, "num_items_in_batch": probe.as_subclass(Tensor) if is_compiled(self.run) else probe}

    def end_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """After a forward pass, also one that failed: mix the loss, or keep what that takes for whoever computes it."""
        if not _is_training(module):
            return None
        with ExitStack() as stack:
            if self.features is not None:
                stack.callback(self.features.tap.close)
            if outputs is None:
                return None
            taken = self.features.tap.read(outputs) if self.features is not None else None
        if self.mixes_in:
            self.inputs, self.taken = _keywords(args, kwargs), taken
            return None
        return self._mix_outputs(module, args, kwargs, outputs, taken)

    def _mix_outputs(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any, taken: Features | None
    ) -> Any:
        """Replace ``outputs.loss``."""
        inputs = _keywords(args, kwargs)
        task_loss = _task_loss(module, outputs)
        labels, shift = self._labels(kwargs)
        num_items = kwargs.get("num_items_in_batch")
        if self.per_item is None and num_items is not None:
            self.per_item = gradient_says(task_loss, num_items)
            task_loss, num_items = task_loss.as_subclass(Tensor), num_items.detach().as_subclass(Tensor)
        outputs["loss"] = self._mix(task_loss, self.losses(outputs, inputs, labels, shift, num_items, taken))
        return outputs

    def mixed(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a ``label_smoother`` or ``compute_loss_func`` that distills as well."""

        def compute_mixed(outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> Tensor:
            inputs, taken = self.inputs, self.taken
            self.inputs = self.taken = None
            if inputs is None:
                return compute(outputs, labels, *args, **kwargs)
            if args:
                raise TrainingError(
                    "distillation: the Trainer's label_smoother or compute_loss_func was called with more than two "
                    "positional arguments. Pass num_items_in_batch and shift_labels by keyword in your compute_loss."
                )
            if self.features is not None and not self.features.is_ready:
                self.rehearse({**inputs, "labels": labels})
            num_items, other = kwargs.get("num_items_in_batch"), None
            if self.per_item is None and num_items is not None:
                other = loss_of_twice_as_many(compute, outputs, labels, kwargs, self.run.device)
            task_loss = compute(outputs, labels, **kwargs)
            if other is not None:
                self.per_item = values_say(task_loss, other)
            return self._mix(task_loss, self.losses(outputs, inputs, labels, self.head.shift, num_items, taken))

        return compute_mixed

    def averages(self) -> dict[str, float]:
        """Return the losses per optimizer step since the last call, over all ranks."""
        self.check()
        if not self.sums:
            return {}
        means = all_reduce_mean(torch.stack(list(self.sums.values()))) / max(self.num_steps, 1)
        found = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums = {}
        self.num_steps = 0
        return found

    def end_step(self) -> None:
        """Check that distillation took part in this optimizer step."""
        if self.num_used == 0:
            raise TrainingError(f"distillation has no effect: {self._why_unused()}")
        if not self.was_checked and self.gradients is not None and float(self.gradients) == 0.0:
            raise TrainingError(
                "distillation has no effect: the loss that it is part of is multiplied by 0. Trainer.compute_loss is "
                "probably overridden; make it use outputs.loss."
            )
        self.was_checked = True
        self._check_answered()
        self.teacher.end_step()
        self.num_computed = self.num_used = 0
        self.num_steps += 1

    def check(self) -> None:
        """Check all that was put off; waits for the device.

        Raises:
            TrainingError: If something went wrong since the last time.
        """
        self._check_answered()
        self.teacher.check()

    def _check_answered(self) -> None:
        missing, self._unanswered = self._unanswered, None
        if missing is not None and int(missing):
            raise TrainingError(
                f"distillation: labels count at {int(missing)} positions that attention_mask leaves out, of which the "
                "cache holds no answers. Set labels to -100 at padding and, where padding comes before a text, at its "
                "first token, which padding would predict; or use the live teacher."
            )

    def losses(
        self,
        outputs: Any,
        inputs: Mapping[str, Any],
        labels: Any,
        shift: bool,
        num_items: Any,
        taken: Features | None = None,
    ) -> dict[str, Tensor]:
        """Return every loss between the student and the teacher by name, normalized as the task loss is.

        Args:
            outputs: Of the student.
            inputs: What it was called with.
            labels: Of the batch, or None.
            shift: Whether position i predicts the label at i + 1.
            num_items: What the task loss is divided by if it is a sum.
            taken: Features of the student, if they are compared.
        """
        own = self.head.logits(outputs, inputs, "student")
        counted = self.head.counted(own, inputs, labels, shift)
        lesson = self.teacher.teach(inputs, self.head, labels)
        if lesson.known is not None:
            known = lesson.known.to(counted.device)
            # A position left out in silence would still be in the count, and the loss too small.
            missing = (counted & ~known).sum()
            self._unanswered = missing if self._unanswered is None else self._unanswered + missing
            counted = counted & known
        count = num_items if self.per_item and num_items is not None else counted.sum().clamp(min=1)
        found = {}
        if self.config.loss is not None and lesson.logits is not None:
            name = self.head.loss_name(self.config.loss, own, labels)
            temperature = value_at(self.config.temperature, self.run)
            padded = self.config.padded_vocabulary and self.head.has_tokens
            found["logits"] = sum_of_losses(name, own, lesson.logits, counted, temperature, padded=padded) / count
        if self.features is not None and taken is not None:
            # An example counts as often as the task loss counts its positions.
            shares = counted.reshape(len(counted), -1).sum(1) / count
            # Where the loss is computed outside the model, it has not got the labels, which show a decoder's padding.
            complete = {**inputs, "labels": labels}
            if not self.features.is_ready:
                self.features.prepare(taken, lesson.features, complete)
            found |= self.features.losses(taken, lesson.features, complete, shares)
        return found

    def _watched(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Features | None]:
        """Return outputs of the student, and its features if they are compared."""
        if self.features is None:
            return model(**inputs), None
        tap = self.features.tap
        try:
            outputs = model(**tap.prepare(dict(inputs)))
            return outputs, tap.read(outputs)
        finally:
            tap.close()

    def _labels(self, inputs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Return labels, and whether position i predicts the label at i + 1."""
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"], False
        return inputs.get("labels"), self.head.shift

    def _mix(self, task_loss: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        # A tensor of its own even if there is one loss: that may be differentiated while this one's gradient arrives.
        distillation_loss = torch.stack(list(losses.values())).sum()
        if not distillation_loss.requires_grad:  # LayerDrop has left no layer to compare
            distillation_loss = distillation_loss + 0.0 * task_loss
        if not distillation_loss.requires_grad:
            raise TrainingError(
                "distillation has no effect: no gradient comes from the model's outputs, because all of its parameters "
                "are frozen. Set requires_grad of those to train, or do not compute the loss under torch.no_grad()."
            )
        alpha = value_at(self.config.alpha, self.run)
        self._watch(task_loss.detach(), distillation_loss, losses, alpha)
        return (1 - alpha) * task_loss + alpha * distillation_loss

    def _watch(self, task_loss: Tensor, total: Tensor, losses: Mapping[str, Tensor], alpha: float) -> None:
        """Count the use of the distillation loss when its gradient arrives, which shows the loss scale in force."""
        self.num_computed += 1
        seen = {"task_loss": task_loss.float(), "distillation_loss": total.detach().float()}
        if len(losses) > 1:
            seen |= {f"{name}_loss": loss.detach().float() for name, loss in losses.items()}
        logits_loss = losses.get("logits")

        # What the hook of a tensor refers to must not lead back to it: no garbage collector sees such a cycle, and the
        # model, its Trainer and the teacher would never be freed.
        def used(gradient: Tensor | None) -> None:
            # DDP passes None instead of not calling the hook.
            if gradient is None:
                return
            self.num_used += 1
            if not self.was_checked:
                self.gradients = gradient.detach().abs() + (0.0 if self.gradients is None else self.gradients)
            scaler = self.run.trainer.accelerator.scaler
            one = gradient.new_ones(())
            loss_scale = scaler.scale(one) if scaler is not None else one  # get_scale() would wait for the device
            factor = gradient.detach().float() / (alpha * loss_scale)
            for name, loss in seen.items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(loss)) + loss * factor
            if logits_loss is not None:
                for listener in self.listeners:
                    listener(logits_loss, gradient)

        total.register_hook(used)  # type: ignore[no-untyped-call]

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


def _task_loss(module: nn.Module, outputs: Any) -> Tensor:
    """Return ``outputs.loss``."""
    task_loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if not isinstance(task_loss, Tensor):
        raise TrainingError(
            f"distillation: {type(module).__name__} returned no loss to mix with (got a {type(outputs).__name__}). "
            "The data needs labels, return_dict must not be False, and an overridden Trainer.compute_loss must "
            "pass labels to the model and use outputs.loss; for your own loss use Trainer(compute_loss_func=...)."
        )
    return task_loss


def computes_as_usual(trainer: Trainer) -> bool:
    """Return whether the model gets the batches of a Trainer as they are."""
    return getattr(trainer.compute_loss, "__func__", None) is Trainer.compute_loss


def is_compiled(run: Run) -> bool:
    """Return whether torch.compile has to do with the model."""
    return bool(run.args.torch_compile) or getattr(run.trainer.model, "_compiled_call_impl", None) is not None


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _keywords(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if args:
        raise TrainingError(
            "distillation: the model was called with positional arguments, which the teacher may order differently. "
            "Call model(**inputs) in your compute_loss."
        )
    return kwargs
