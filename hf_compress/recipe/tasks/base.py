"""What sets one task apart from another: how data become inputs, and how good a model is at it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_compress.config import DatasetConfig
from hf_compress.recipe.models import load_tokenizer
from hf_compress.recipe.splits import Splits

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What a model is evaluated on."""

    batches: Iterable[Batch]
    """The encoded data, in order."""

    references: Any
    """What ``Task.encode`` left in ``Splits.references``."""

    processor: Any
    """The tokenizer or image processor."""

    args: TrainingArguments
    """The recipe's training arguments, which say where to compute."""

    @contextmanager
    def outputs(self, model: nn.Module) -> Iterator[Iterator[tuple[Any, Batch]]]:
        """Give what a model returns for each batch, and the batch; afterwards the model is on the CPU, in eval mode."""
        model.eval().to(self.args.device)
        try:
            with torch.no_grad():
                yield ((model(**batch), batch) for batch in self.on_device())
        finally:
            model.to("cpu")

    def on_device(self) -> Iterator[Batch]:
        """Yield the batches where the model is."""
        for batch in self.batches:
            yield {name: value.to(self.args.device) for name, value in batch.items()}


class Task(ABC):
    """A task that a recipe can train; see ``TASKS_BY_NAME``."""

    name: ClassVar[str]
    """In recipes."""

    hub_name: ClassVar[str]
    """On the Hub."""

    auto_class: ClassVar[Any]
    """The class that loads its models."""

    trainer_class: ClassVar[type[Trainer]] = Trainer
    arguments_class: ClassVar[type[TrainingArguments]] = TrainingArguments

    default_arguments: ClassVar[Mapping[str, Any]] = {}
    """Training arguments where the recipe says nothing."""

    has_classes: ClassVar[bool] = False
    """Whether labels are classes, which are numbered before ``encode``."""

    may_have_new_head: ClassVar[bool] = True
    """Whether a pretrained model without the task's head is given a random one."""

    def load_processor(self, name: str) -> Any:
        """Return what makes inputs of a row of data, and is saved with the model.

        Raises:
            ConfigError: If it cannot be loaded.
        """
        return load_tokenizer(name)

    @abstractmethod
    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Turn rows into what the model reads; labels of classes are numbers already, in the column ``labels``.

        Raises:
            ConfigError: If a column is missing or of the wrong type.
        """

    @abstractmethod
    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what makes a batch of encoded rows."""

    def trainer_options(self, processor: Any, splits: Splits, args: TrainingArguments) -> dict[str, Any]:
        """Return arguments for the Trainer, such as ``compute_metrics``."""
        return {}

    def length(self, splits: Splits) -> int | None:
        """Return the tokens of the longest evaluation example, or None if there are no tokens."""
        return max(len(ids) for ids in splits.evaluation["input_ids"])

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> dict[str, float]:
        """Return metric -> value, the most telling one first."""


def best_class(logits: Any, labels: Tensor) -> Tensor:
    """Keep class numbers alone, which take less memory; for ``Trainer(preprocess_logits_for_metrics=...)``."""
    found: Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    return found
