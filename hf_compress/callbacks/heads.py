"""What a model's outputs say for its task, at which positions, and which loss compares it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CTC_MAPPING_NAMES

from hf_compress.config.distillation import AUTO
from hf_compress.distillation.positions import counted_positions
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.attach import own_class
from hf_compress.instruments.stacks import position_mask

SPANS = ("start_logits", "end_logits")

LOSS_OF_TASK = {"regression": "mse", "multi_label_classification": "binary_kl"}
"""Problem type -> the one loss of logits that means something for it; others compare distributions over classes."""

ANSWERS = "ForQuestionAnswering"
"""Loss type of models that look for an answer in a text, and of some that choose among answers to an image."""

WHOLE_EXAMPLE = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification")
"""Loss types of models that may be for regression or several labels, and say so in ``config.problem_type``."""


class Head:
    """Reads logits, [batch, classes] or [batch, length, classes], with labels for the same positions."""

    labels_argument = "labels"
    """What the model's forward calls its labels; the Trainer smooths nothing but ``labels``."""

    speaks_of_whole_texts = False
    """Whether positions of the text are the classes, rather than having them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shift = _shifts_labels(model)
        """Whether position i predicts the label at i + 1, by the rules the Trainer counts and smooths labels with."""
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.has_tokens = head is not None or _is_ctc(model)
        """Whether the classes are tokens of a vocabulary."""

    def logits(self, outputs: Any, inputs: Mapping[str, Any], who: str) -> Tensor:
        """Return what the model says.

        Args:
            outputs: Of the student or the teacher.
            inputs: What it was called with.
            who: ``"student"`` or ``"teacher"``, for messages.

        Raises:
            TrainingError: If the outputs have no such thing.
        """
        return logits_of(outputs, who)

    def counted(self, logits: Tensor, inputs: Mapping[str, Any], labels: Any, shift: bool) -> Tensor:
        """Return which positions the task loss counts, bool, the shape of the logits without the last dimension.

        Raises:
            TrainingError: If shapes do not fit each other.
        """
        if self.problem_type(logits, labels) in LOSS_OF_TASK:
            return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        if isinstance(labels, Tensor) and logits.dim() == 2 and labels.shape == logits.shape:
            raise TrainingError(
                f"distillation: {type(self.model).__name__} returns one number for each position, logits "
                f"{list(logits.shape)} with labels {list(labels.shape)}, and no dimension of classes; allowed: [batch, "
                "classes] with labels [batch], [batch, length, classes] with labels [batch, length], or several labels "
                "of yes or no as floats. Such heads cannot be distilled; give both models one with classes."
            )
        prefix = "decoder_" if self.model.config.is_encoder_decoder else ""
        return counted_positions(
            logits, labels=labels, attention_mask=inputs.get(f"{prefix}attention_mask"), shift=shift
        )

    def problem_type(self, logits: Tensor, labels: Any) -> str | None:
        """Return the problem type of a classification head, found out as Transformers does; None for other heads."""
        config: Any = self.model.config
        several = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == logits.shape
        if self.model.loss_type == ANSWERS and logits.dim() == 2 and several:
            return "multi_label_classification"
        if self.model.loss_type not in WHOLE_EXAMPLE or logits.dim() != 2:
            return None
        if getattr(config, "problem_type", None) is not None:
            return str(config.problem_type)
        if logits.shape[-1] == 1:
            return "regression"
        return "multi_label_classification" if several else "single_label_classification"

    def is_regression(self) -> bool:
        """Return whether the config says that the head gives values, for which no temperature exists."""
        config: Any = self.model.config
        if self.model.loss_type not in WHOLE_EXAMPLE:
            return False
        kind = getattr(config, "problem_type", None)
        return kind == "regression" or (kind is None and config.num_labels == 1)

    def loss_name(self, wanted: str, logits: Tensor, labels: Any) -> str:
        """Return the name of the loss of logits.

        Args:
            wanted: What the config asks for.
            logits: Of the student.
            labels: Of the batch, if known.

        Raises:
            ConfigError: If it says nothing about logits of this task.
        """
        suits = LOSS_OF_TASK.get(self.problem_type(logits, labels) or "")
        if wanted == AUTO:
            return suits or "kl"
        if suits is not None and wanted not in ("mse", suits):
            raise ConfigError(
                f"DistillationConfig.loss: got {wanted!r}, which compares distributions over classes; the student's "
                f"task is {self.problem_type(logits, labels)}. Allowed: {', '.join(map(repr, {suits: 0, 'mse': 0}))}, "
                "or 'auto'."
            )
        return wanted


class SpanHead(Head):
    """Reads where an answer starts and ends: two distributions over the positions of a text, [batch, 2, length].

    Padding can be neither; Transformers' loss is the mean of both.
    """

    labels_argument = "start_positions"
    speaks_of_whole_texts = True

    def logits(self, outputs: Any, inputs: Mapping[str, Any], who: str) -> Tensor:
        """Return [batch, 2, length]."""
        found = [outputs.get(name) for name in SPANS] if isinstance(outputs, Mapping) else [None]
        if not all(isinstance(each, Tensor) for each in found):
            raise TrainingError(
                f"distillation: the {who} returned {_describe(outputs)} instead of start_logits and end_logits, which "
                "the student returns. Use a teacher with the same head."
            )
        stacked = torch.stack([each for each in found if each is not None], dim=1)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == (len(stacked), stacked.shape[-1]):
            stacked = stacked.masked_fill(~mask.bool().to(stacked.device).unsqueeze(1), -torch.inf)
        return stacked

    def counted(self, logits: Tensor, inputs: Mapping[str, Any], labels: Any, shift: bool) -> Tensor:
        """Return that both ends count, [batch, 2]."""
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)


class FrameHead(Head):
    """Reads logits of frames, [batch, frames, vocabulary], whose labels are for no frame in particular (CTC)."""

    def counted(self, logits: Tensor, inputs: Mapping[str, Any], labels: Any, shift: bool) -> Tensor:
        """Return the frames that are no padding, [batch, frames]."""
        return position_mask(self.model, "encoder", inputs, logits)


def head_of(model: PreTrainedModel) -> Head:
    """Return what reads the outputs of a model."""
    if SpanHead.labels_argument in inspect.signature(own_class(model).forward).parameters:
        return SpanHead(model)
    return FrameHead(model) if _is_ctc(model) else Head(model)


def logits_of(outputs: Any, who: str) -> Tensor:
    """Return ``outputs["logits"]``.

    Raises:
        TrainingError: If there are none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        raise TrainingError(
            f"distillation: the {who} returned {_describe(outputs)} instead of a ModelOutput with logits. Do not set "
            "return_dict=False. Fused losses never have logits: turn use_liger_kernel off, and give TRL's SFTTrainer a "
            "compute_loss_func, which it calls with them. Heads with other outputs cannot be distilled."
        )
    return logits


def _is_ctc(model: PreTrainedModel) -> bool:
    return own_class(model).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values() or model.loss_type == "ForCTC"


def _describe(outputs: Any) -> str:
    return f"only {list(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"


def _shifts_labels(model: PreTrainedModel) -> bool:
    if model.config.is_encoder_decoder:
        return False
    named = own_class(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return named or LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
