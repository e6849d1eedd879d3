"""Adapters around a model for one training run."""

from dataclasses import replace
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model

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
"""What PEFT knows of tasks, whose heads it trains whole."""

HEAD = "classifier"
"""The head of models for images, of which PEFT knows nothing."""


def with_adapters(prepared: Prepared, section: LoraSection) -> Prepared:
    """Return the same run with adapters around the model, which alone will be trained, beside the task's head.

    Raises:
        ConfigError: If there is nothing to put them on.
    """
    model: Any = prepared.student.model
    kind = TASK_TYPES.get(prepared.task.name)
    head = [HEAD] if kind is None and hasattr(model, HEAD) else None
    targets = section.target_modules
    config = LoraConfig(
        task_type=kind,
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=head,
    )
    try:
        wrapped: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora: PEFT refuses it: {' '.join(str(error).split())}") from error
    return replace(prepared, student=replace(prepared.student, model=wrapped))


def merged(model: Any) -> Any:
    """Return the model with its adapters merged into the weights."""
    return model.merge_and_unload()


def without_adapters(model: Any) -> Any:
    """Return the model as it was before ``with_adapters``."""
    return model.unload()
