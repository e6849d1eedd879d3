"""Whether labels and token ids mean the same to a teacher and a student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_compress.errors import ConfigError, TrainingError

_TEXT_CONFIGS = ("text_encoder", "decoder", "generator", "text_config")
"""Parts of a config that ``get_text_config`` looks for."""


@dataclass(frozen=True)
class Task:
    """What a config says of its task."""

    labels: tuple[str, ...] | None
    """Names of the labels in their order; None if it has none."""

    problem_type: str | None
    vocab_size: int | None

    @classmethod
    def of(cls, config: Any) -> "Task":
        """Read a config."""
        names = getattr(config, "id2label", None)
        labels = None if names is None else tuple(names[index] for index in sorted(names))
        size = getattr(config.get_text_config(), "vocab_size", None)
        return cls(labels, getattr(config, "problem_type", None), size)

    @classmethod
    def stored(cls, config: Mapping[str, Any]) -> "Task":
        """Read what ``to_dict`` of a config has become in JSON; its class may be unknown here.

        Raises:
            ValueError: If an entry is of another type than a config would write.
        """
        parts = [config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), Mapping)]
        size = (parts[0] if parts else config).get("vocab_size")
        if size is not None and type(size) is not int:
            raise ValueError(f"vocab_size is {size!r}; allowed: an int or null")
        kind = config.get("problem_type")
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f"problem_type is {kind!r}; allowed: a text or null")
        return cls(_stored_labels(config.get("id2label")), kind, size)


def check_same_task(theirs: Task, student: PreTrainedModel, *, labels: bool = True, padded: bool = False) -> None:
    """Check that labels and vocabulary of the teacher are those of the student.

    Args:
        theirs: Of the teacher.
        student: The model that learns.
        labels: Whether labels are compared.
        padded: Whether the vocabularies may be of different sizes.

    Raises:
        TrainingError: If they differ.
    """
    own = Task.of(student.config)
    head: Any = student.get_output_embeddings()  # type: ignore[no-untyped-call]
    if labels and head is None:
        _check_labels(theirs, own)
    sizes = [theirs.vocab_size, own.vocab_size]
    if not padded and None not in sizes and sizes[0] != sizes[1]:
        raise TrainingError(
            f"the teacher's vocabulary has {sizes[0]} tokens, the student's {sizes[1]}; token ids must mean the same "
            "to both. Use a teacher with the student's tokenizer. If it has that, and one table is only padded, set "
            "DistillationConfig(padded_vocabulary=True)."
        )


def check_padding(theirs: Sequence[int | None], student: PreTrainedModel) -> None:
    """Check that ``padded_vocabulary`` has an effect, as far as configs say.

    Args:
        theirs: Sizes of the vocabularies of all models that teach; None where it is not known.
        student: The model that learns.

    Raises:
        ConfigError: If all sizes are those of the student.
    """
    size = Task.of(student.config).vocab_size
    if size is not None and all(each == size for each in theirs):
        raise ConfigError(
            f"DistillationConfig.padded_vocabulary: got True; allowed: False, since the vocabularies of teacher and "
            f"student have {size} tokens each, where it would have no effect."
        )


def _stored_labels(names: Any) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, Mapping) or not all(str(key).isdecimal() for key in names):
        raise ValueError(f"id2label is {names!r}; allowed: an object {{number: label}} or null")
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _check_labels(theirs: Task, own: Task) -> None:
    if theirs.labels is not None and own.labels is not None:
        if len(theirs.labels) != len(own.labels):
            raise TrainingError(
                f"the teacher has {len(theirs.labels)} labels, the student {len(own.labels)}; they must have the same. "
                "Use a teacher that was fine-tuned for the student's task."
            )
        default = tuple(f"LABEL_{index}" for index in range(len(own.labels)))
        if default not in (theirs.labels, own.labels) and theirs.labels != own.labels:
            raise TrainingError(
                f"the teacher's labels are {list(theirs.labels)}, the student's {list(own.labels)}; names and order "
                "must be equal. Set config.id2label and config.label2id of the student, and its data, as the teacher "
                "has them."
            )
    kinds = [theirs.problem_type, own.problem_type]
    if None not in kinds and kinds[0] != kinds[1]:
        raise TrainingError(
            f"the teacher's problem_type is {kinds[0]!r}, the student's {kinds[1]!r}; they must be equal. Use a "
            "teacher that was fine-tuned for the student's task."
        )
