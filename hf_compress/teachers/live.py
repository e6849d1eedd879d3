"""A teacher that is there: which model it is, and what it says about a batch."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import TrainingError
from hf_compress.instruments.adapters import without_wrapper
from hf_compress.instruments.sharded import whole
from hf_compress.latency.key import config_digest
from hf_compress.teachers.inputs import in_precision_of, read_inputs, without_own_loss
from hf_compress.teachers.manifest import OutputSpec

_LOGITS = "logits"


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model's class, config and all of its weights, bit by bit.

    Names in the config that change no output, such as those of labels, are left out.

    Raises:
        TrainingError: If weights are not in memory.
    """
    plain: Any = without_wrapper(model)
    found = hashlib.sha256(f"{type(plain).__name__} {config_digest(plain.config.to_dict())}".encode())
    for name, value in sorted(plain.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        if value.is_meta:
            raise TrainingError(
                f"teacher cache: the teacher's {name} is not in memory, so there is nothing to recognize it by. Load "
                "the teacher on one device, without offloading."
            )
        tensor = whole(value).detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def speaking(teacher: nn.Module) -> Iterator[None]:
    """Put a teacher in eval mode without gradients; on leaving, give back the modes it had."""
    modes = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def teacher_outputs(
    teacher: nn.Module, inputs: Mapping[str, Any], autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a teacher's logits by name; those of question answering are ``start_logits`` and ``end_logits``.

    Args:
        teacher: The teacher, wrappers included.
        inputs: Keyword arguments for a model; those the teacher does not read are left out.
        autocast: What to compute in; None: as the weights are.

    Raises:
        TrainingError: If it returns none.
    """
    taken = in_precision_of(teacher, read_inputs(teacher, inputs))
    if _has_unknown_labels(teacher, taken):
        taken = without_own_loss(teacher, taken)
    if hasattr(without_wrapper(teacher).config.get_text_config(), "use_cache"):
        taken["use_cache"] = False
    device = next(teacher.parameters()).device.type
    with nullcontext() if autocast is None else torch.autocast(device, autocast):
        outputs = teacher(**taken)
    given = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    if _LOGITS in given:
        return {_LOGITS: given[_LOGITS]}
    found = {name: value for name, value in given.items() if name.endswith(f"_{_LOGITS}")}
    if not found:
        raise TrainingError(
            f"teacher cache: the teacher returned {sorted(given)}, which has no logits. Use a teacher with a head, and "
            "without fused losses."
        )
    return found


def _has_unknown_labels(teacher: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether labels are beyond the vocabulary, as may be where the student's is padded to a larger size."""
    labels = inputs.get("labels")
    size = getattr(without_wrapper(teacher).config.get_text_config(), "vocab_size", None)
    return isinstance(labels, Tensor) and isinstance(size, int) and labels.numel() > 0 and int(labels.max()) >= size


def output_specs(outputs: Mapping[str, Tensor], counts: Tensor | None) -> tuple[OutputSpec, ...]:
    """Return what the outputs for a batch are, which has to be the same for every other batch.

    Args:
        outputs: See ``teacher_outputs``.
        counts: See ``InputSpec.output_counts``.

    Raises:
        TrainingError: If it cannot be told what positions of the outputs correspond to.
    """
    return tuple(_spec(name, value, counts) for name, value in sorted(outputs.items()))


def _spec(name: str, value: Tensor, counts: Tensor | None) -> OutputSpec:
    # [batch, classes] could be taken for [batch, length] where there are as many of both.
    may_have_positions = value.dim() > (2 if name == _LOGITS else 1)
    if counts is None or not may_have_positions:
        return OutputSpec(name, False, tuple(value.shape[1:]))
    if value.shape[:2] != counts.shape:
        raise TrainingError(
            f"teacher cache: {name} has shape {list(value.shape)}, but the inputs have {list(counts.shape)} positions, "
            "so it cannot be told which outputs are padding. Use the live teacher."
        )
    return OutputSpec(name, True, tuple(value.shape[2:]))
