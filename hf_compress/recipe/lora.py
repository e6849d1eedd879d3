"""Adapters around a model for one training run."""

from dataclasses import replace
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedModel

from hf_compress.config.lora import LoraSection
from hf_compress.errors import ConfigError
from hf_compress.recipe.trainer import Prepared

TASK_TYPES = {
    "text-classification": TaskType.SEQ_CLS,
    "token-classification": TaskType.TOKEN_CLS,
    "question-answering": TaskType.QUESTION_ANS,
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
}
"""What PEFT knows of tasks; of models for images it knows nothing."""

GENERATING = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
"""Their heads are output layers of the pretrained model, none that a task brings."""


def with_adapters(prepared: Prepared, section: LoraSection) -> Prepared:
    """Return the same run with adapters around the model, which alone will be trained, beside the task's head.

    Raises:
        ConfigError: If there is nothing to put them on.
    """
    model: Any = prepared.student.model
    kind = TASK_TYPES.get(prepared.task.name)
    targets = section.target_modules
    config = LoraConfig(
        task_type=kind,
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=None if kind in GENERATING else _head(model) or None,
    )
    try:
        wrapped: Any = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora: PEFT refuses target_modules={targets!r}: {' '.join(str(error).split())}") from error
    return replace(prepared, student=replace(prepared.student, model=wrapped))


def _head(model: PreTrainedModel) -> list[str]:
    """Return the modules outside the base model, which are trained whole.

    PEFT has a list of names for that, but looks at it only after adapters were put on all linear layers.
    """
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]


def merged(model: Any) -> Any:
    """Return the model with its adapters merged into the weights."""
    return model.merge_and_unload()


def without_adapters(model: Any) -> Any:
    """Return the model as it was before ``with_adapters``."""
    return model.unload()
