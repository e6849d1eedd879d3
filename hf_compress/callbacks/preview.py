"""What a run is going to do, said before the first step: a dry run that fails where training would."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_compress.errors import TrainingError
from hf_compress.teachers.loader import train_dataloader


@dataclass(frozen=True)
class Preview:
    """The plan of a run; prints as an indented list."""

    total_steps: int
    """Optimizer steps of the whole run."""

    sections: Mapping[str, Mapping[str, Any]]
    """Facts by callback: ``"pruning"``, ``"quantization"``, ``"distillation"``; plain numbers, texts, lists, dicts."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and texts."""
        return {"total_steps": self.total_steps, **{name: dict(facts) for name, facts in self.sections.items()}}

    def __str__(self) -> str:
        lines = [f"optimizer steps: {self.total_steps:,}"]
        for name, facts in self.sections.items():
            lines += [name, *_lines(facts, "  ")]
        return "\n".join(lines)


@runtime_checkable
class Previewable(Protocol):
    """A callback that can say what it is going to do."""

    def preview(self, trainer: Trainer) -> Preview:
        """Return the plan of this callback."""
        ...


def preview(trainer: Trainer) -> Preview:
    """Say what the compression callbacks of a Trainer are going to do, without training.

    Everything up to the first step is done for real: models are analyzed, teachers loaded, a copy is shrunk on trial,
    the first batch, unless it comes from a stream, is run through student and teacher. Afterwards all is as it was,
    random states too.

    Args:
        trainer: A Trainer with compression callbacks that has not trained yet.

    Raises:
        TrainingError: If it has none, or has trained already.
        CompressionError: Whatever ``trainer.train()`` would raise at its begin, and what ``shrink`` would at the end.
    """
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, Previewable)]
    if not callbacks:
        raise TrainingError("preview: the Trainer has no compression callback. Pass some in Trainer(callbacks=[...]).")
    parts = [callback.preview(trainer) for callback in callbacks]
    return Preview(parts[0].total_steps, {name: facts for part in parts for name, facts in part.sections.items()})


def count_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of a whole run.

    Raises:
        TrainingError: If neither ``max_steps`` nor the length of the data set says.
    """
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    with train_dataloader(trainer) as dataloader:
        try:
            return int(_initial_values(trainer, dataloader)[-1])
        except ValueError as error:
            raise TrainingError(f"preview: the number of optimizer steps is unknown: {error} Set max_steps.") from error


def steps_per_epoch(trainer: Trainer) -> int:
    """Return the optimizer steps of an epoch.

    Raises:
        TrainingError: If the length of the data set is not known.
    """
    with train_dataloader(trainer) as dataloader:
        if not has_length(dataloader):
            raise TrainingError("the train data set has no length, so moments cannot be given in epochs. Give steps.")
        return int(_initial_values(trainer, dataloader)[1])


def first_batch(trainer: Trainer) -> dict[str, Any] | None:
    """Return a training batch as the model gets it, on the training device; None of a stream, which would lose it."""
    with train_dataloader(trainer) as dataloader:
        if isinstance(dataloader, Iterator) or isinstance(getattr(dataloader, "dataset", None), IterableDataset):
            return None
        # PyTorch's own start over, also where they keep their workers and so their iterator.
        if not isinstance(dataloader, DataLoader) and iter(dataloader) is iter(dataloader):
            return None
        batch: dict[str, Any] = trainer._prepare_inputs(next(iter(dataloader)))
    return batch


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give back the modes and buffers that a model had: BatchNorm's statistics move with every batch it sees."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, before in buffers:
            # By ``data``: a backward pass to come may need the buffer, and would take copy_ for a change of it.
            buffer.data.copy_(before)
            module._buffers[name] = buffer


def _initial_values(trainer: Trainer, dataloader: Any) -> tuple[Any, ...]:
    return trainer.set_initial_training_values(trainer.args, dataloader)


def _lines(facts: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list):
            yield f"{indent}{name}: {', '.join(map(_text, value))}"
        else:
            yield f"{indent}{name}: {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
