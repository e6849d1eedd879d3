"""``Recipe``: what a run does, and, for runs from a file, with which model and data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_compress.config.base import Config
from hf_compress.config.data import DatasetConfig
from hf_compress.config.methods import DistillationConfig, QuantizationConfig
from hf_compress.config.pruning import PruningConfig
from hf_compress.errors import ConfigError, choices

TASKS = ("text-classification", "token-classification", "causal-lm", "seq2seq-lm")
"""The tasks that a recipe can train."""

LABELED_TASKS = {"text-classification": "label", "token-classification": "labels"}
"""Tasks that need a column of labels -> its name by default."""

_METHODS: dict[str, type[Config]] = {
    "pruning": PruningConfig,
    "quantization": QuantizationConfig,
    "distillation": DistillationConfig,
}

_NOT_HERE = {
    "output_dir": "Set the recipe's output; checkpoints go to a folder in it.",
    "resume_from_checkpoint": "Run with --resume, or run_recipe(..., resume=True).",
    "do_train": "A recipe always trains, evaluates and saves.",
    "do_eval": "Set eval_strategy to evaluate while training; a recipe always evaluates at the end.",
    "do_predict": "A recipe predicts nothing; load the saved model.",
    "predict_with_generate": "A recipe evaluates the loss of the targets.",
}
"""Fields of TrainingArguments that a recipe has another way for -> that way."""


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(Config):
    """How the pruned model is made smaller, see ``shrink``."""

    uniform: bool = False
    """The same sizes in all layers, so that plain transformers loads the result."""

    multiple_of: int = 1
    """Sizes of feed-forward layers are rounded up to multiples of this."""

    def _validate(self) -> None:
        self._check_choice("uniform", (True, False))
        self._check_count("multiple_of")


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """What one training run does: any subset of the three methods.

    ``model``, ``task``, ``dataset`` and ``output`` make a whole run of it, for ``run_recipe`` and ``hf-compress run``;
    ``make_callbacks`` needs none of them.
    """

    model: str | None = None
    """Hub name or folder of the model to compress."""

    task: str | None = None
    """What the model learns: a name in ``TASKS``."""

    dataset: DatasetConfig | None = None
    """What it learns from."""

    pruning: PruningConfig | None = None
    """Structured pruning, or None."""

    quantization: QuantizationConfig | None = None
    """Fake quantization, or None."""

    distillation: DistillationConfig | None = None
    """Distillation, or None."""

    teacher: str | None = None
    """Hub name or path of the teacher, for runs started from a recipe file."""

    training: Mapping[str, Any] | None = None
    """Fields of ``TrainingArguments`` (``Seq2SeqTrainingArguments`` for seq2seq-lm), such as ``learning_rate``."""

    shrink: ShrinkConfig | None = None
    """How the pruned model is made smaller; ``None``: as ``shrink`` does by itself."""

    export: str | None = None
    """Format of ``export_quantized`` in which the model is saved as well, or None."""

    output: str | None = None
    """Folder for the checkpoints and the compressed model; new, or of this very recipe."""

    def _validate(self) -> None:
        self._build_sections()
        if all(getattr(self, name) is None for name in _METHODS):
            raise ConfigError("Recipe: nothing to do; give at least one of pruning, quantization, distillation.")
        if self.teacher is not None and self.distillation is None:
            raise self._error("teacher", self.teacher, "None without a distillation section")
        if self.shrink is not None and self.pruning is None:
            raise self._error("shrink", self.shrink.to_dict(), "None without a pruning section")
        for name in ("model", "teacher", "export", "output"):
            if getattr(self, name) is not None:
                self._check_text(name)
        if self.task is not None:
            self._check_choice("task", TASKS)
        self._check_columns()
        if self.training is not None:
            self._check_training()

    def _build_sections(self) -> None:
        sections: dict[str, type[Config]] = {**_METHODS, "dataset": DatasetConfig, "shrink": ShrinkConfig}
        for name, kind in sections.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, kind.from_dict(value))
            elif value is not None and not isinstance(value, kind):
                raise self._error(name, value, f"a {kind.__name__}, a mapping of its fields, or None")

    def _check_columns(self) -> None:
        """A column that the task does not read is an error, and so is one that it lacks."""
        if self.dataset is None or self.task is None:
            return
        data, task = self.dataset, self.task
        if data.label_column is not None and task not in LABELED_TASKS:
            raise self._error("dataset.label_column", data.label_column, f"None for {task}")
        if (data.target_column is not None) != (task == "seq2seq-lm"):
            allowed = "the column of the text to write" if task == "seq2seq-lm" else "None"
            raise self._error("dataset.target_column", data.target_column, f"{allowed} for {task}")
        if len(data.text_columns) == 2 and task != "text-classification":
            raise self._error("dataset.text_columns", list(data.text_columns), f"one column for {task}")

    def _check_training(self) -> None:
        if not isinstance(self.training, Mapping):
            raise self._error("training", self.training, "a mapping of TrainingArguments fields, or None")
        kind = Seq2SeqTrainingArguments if self.task == "seq2seq-lm" else TrainingArguments
        fields = {field.name: field.default for field in dataclasses.fields(kind) if field.init}
        known = set(fields) - set(_NOT_HERE)
        for key, value in self.training.items():
            if key in _NOT_HERE:
                raise ConfigError(f"Recipe.training: {key!r} has no place in a recipe. {_NOT_HERE[key]}")
            if key not in known:
                raise ConfigError(f"Recipe.training: unknown key {key!r}; {choices(key, known)}.")
            # TrainingArguments checks no types, so that a wrong one would come up somewhere in the run.
            default = fields[key]
            if isinstance(default, bool) and not isinstance(value, bool):
                raise self._error(f"training.{key}", value, "true or false")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(default, int | float) and not isinstance(default, bool) and not number:
                raise self._error(f"training.{key}", value, "a number")
        object.__setattr__(self, "training", dict(self.training))
