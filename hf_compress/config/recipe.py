"""``Recipe``: what a run does, and, for runs from a file, with which model and data."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_compress.config.base import Config
from hf_compress.config.data import DatasetConfig
from hf_compress.config.distillation import DistillationConfig
from hf_compress.config.lora import LoraSection
from hf_compress.config.pruning import PruningConfig
from hf_compress.config.quantization import QuantizationConfig
from hf_compress.config.sections import METHODS, build_sections, check_sections, check_training
from hf_compress.config.stages import StageConfig
from hf_compress.config.tasks import TASK_COLUMNS, TASKS
from hf_compress.errors import ConfigError

DENSE = "dense"
"""The teacher that is the model before compression."""


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(Config):
    """How the pruned model is made smaller, see ``shrink``."""

    uniform: bool = False
    """The same sizes in all layers, so that plain transformers loads the result."""

    multiple_of: int = 1
    """Sizes of feed-forward layers are rounded up to multiples of this."""

    def _validate(self) -> None:
        self._check_bool("uniform")
        self._check_count("multiple_of")


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """What one training run does: any subset of the three methods; or several runs in a row, see ``stages``.

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

    stages: tuple[StageConfig, ...] | None = None
    """Runs in a row, instead of the three sections above: the model is shrunk after each, and the next one trains what
    is left."""

    teacher: str | Sequence[str] | None = None
    """Hub name or path of the teacher, for runs started from a recipe file; the same one in all stages. ``"self"`` is a
    copy of the model that the run, or each stage, begins with, ``"unmasked"`` the student of the same step without its
    masks, ``"dense"`` what the recipe begins with, or what its first stages made of that if they only train; several
    in a list teach together, see ``DistillationCallback``."""

    oneshot_batches: int | None = None
    """See ``StageConfig``."""

    lora: LoraSection | None = None
    """See ``StageConfig``."""

    training: Mapping[str, Any] | None = None
    """Fields of ``TrainingArguments`` (``Seq2SeqTrainingArguments`` for seq2seq-lm), such as ``learning_rate``."""

    shrink: ShrinkConfig | None = None
    """How the pruned model is made smaller; ``None``: as ``shrink`` does by itself."""

    export: str | None = None
    """Format of ``export_quantized`` in which the model is saved as well, or None."""

    hub_model_id: str | None = None
    """Repository on the Hub to upload the compressed model to, ``"name"`` or ``"owner/name"``; an exported format goes
    to a branch that is called like it. None: nothing is uploaded."""

    hub_private: bool = False
    """Whether that repository is private if it is new; if not, the account's setting decides."""

    output: str | None = None
    """Folder for the checkpoints and the compressed model; new, or of this very recipe."""

    def _validate(self) -> None:
        build_sections(self, {**METHODS, "dataset": DatasetConfig, "shrink": ShrinkConfig, "lora": LoraSection})
        check_sections(self)
        self._check_stages()
        runs: Sequence[Any] = (self,) if self.stages is None else self.stages
        if not isinstance(self, PlainRun) and all(getattr(run, name) is None for run in runs for name in METHODS):
            raise ConfigError("Recipe: nothing to do; give at least one of pruning, quantization, distillation.")
        for name, needs in {"teacher": "distillation", "shrink": "pruning"}.items():
            value = getattr(self, name)
            if value is not None and all(getattr(run, needs) is None for run in runs):
                raise self._error(name, _plain(value), f"None without a {needs} section")
        for name in ("model", "export", "output"):
            if getattr(self, name) is not None:
                self._check_text(name)
        self._check_teacher()
        self._check_hub()
        if self.task is not None:
            self._check_choice("task", TASKS)
        self._check_columns()
        for each in (self, *(self.stages or ())):
            check_training(each, self.task)

    def teachers(self) -> tuple[str, ...]:
        """Return the teachers; none where the recipe has none."""
        return () if self.teacher is None else (self.teacher,) if isinstance(self.teacher, str) else tuple(self.teacher)

    def _check_hub(self) -> None:
        self._check_bool("hub_private")
        if self.hub_model_id is None and self.hub_private:
            raise self._error("hub_private", True, "False without hub_model_id")
        if self.hub_model_id is not None:
            self._check_text("hub_model_id")
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise self._error("hub_model_id", self.hub_model_id, "'name' or 'owner/name'", str(error)) from error

    def _check_teacher(self) -> None:
        given: Any = self.teacher
        if isinstance(given, list | tuple):
            object.__setattr__(self, "teacher", tuple(given))
        elif given is not None and not isinstance(given, str):
            given = [given]
        if given is not None and (not given or not all(isinstance(each, str) and each for each in given)):
            raise self._error(
                "teacher",
                self.teacher,
                "a Hub name or folder, 'self', 'unmasked', 'dense', a list of these, or None",
            )

    def _check_stages(self) -> None:
        """Stages are a list of at least one, beside which the recipe has no sections of its own."""
        if self.stages is None:
            return
        if not isinstance(self.stages, list | tuple) or not self.stages:
            raise self._error("stages", self.stages, "a list of at least one stage, or None")
        for name in (*METHODS, "oneshot_batches", "lora"):
            if getattr(self, name) is not None:
                raise self._error(name, _plain(getattr(self, name)), "None beside stages", "Put it into a stage.")
        found = []
        for number, stage in enumerate(self.stages, 1):
            if isinstance(stage, Mapping):
                try:
                    stage = StageConfig.from_dict(stage)
                except ConfigError as error:
                    raise ConfigError(f"Recipe.stages, stage {number}: {error}") from error
            elif not isinstance(stage, StageConfig):
                raise self._error(f"stages, stage {number}", stage, "a StageConfig or a mapping of its fields")
            forgotten = stage.forgotten()
            if forgotten is not None and (number < len(self.stages) or stage.repeat > 1):
                raise ConfigError(
                    f"Recipe.stages, stage {number}: {forgotten} would be forgotten by what trains after it. Put it "
                    "into the last stage, and that once."
                )
            found.append(stage)
        object.__setattr__(self, "stages", tuple(found))

    def runs(self) -> tuple["Recipe", ...]:
        """Return one recipe without stages for every training run: for each stage, as often as it is repeated.

        All have the recipe's own model; a run begins with what the one before it left.
        """
        if self.stages is None:
            return (self,)
        stages = [stage for stage in self.stages for _ in range(stage.repeat)]
        return tuple(self._run_of(stage, n == len(stages)) for n, stage in enumerate(stages, 1))

    def _run_of(self, stage: StageConfig, is_last: bool) -> "Recipe":
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        common |= {name: getattr(stage, name) for name in (*METHODS, "oneshot_batches", "lora")}
        common |= {
            "stages": None,
            "training": stage.arguments(self.training),
            "teacher": None if stage.distillation is None else self.teacher,
            "shrink": None if stage.pruning is None else self.shrink,
            "export": self.export if is_last else None,
        }
        return (PlainRun if stage.is_plain() else Recipe)(**common)

    def with_dense(self, model: str | None) -> "Recipe":
        """Return the recipe with a model in place of ``teacher: dense``.

        Raises:
            ConfigError: If it has that teacher, but there is no model.
        """
        if DENSE not in self.teachers():
            return self
        if model is None:
            raise ConfigError(
                f"Recipe.teacher: got {DENSE!r}, which is the recipe's model, but it names none. Set model."
            )
        teachers = tuple(model if name == DENSE else name for name in self.teachers())
        return dataclasses.replace(self, teacher=teachers[0] if isinstance(self.teacher, str) else teachers)

    def _check_columns(self) -> None:
        """A setting of the data that the task does not read is an error, and so is one that it lacks."""
        if self.dataset is None or self.task is None:
            return
        data, task, columns = self.dataset, self.task, TASK_COLUMNS[self.task]
        if columns.has_target != (data.target_column is not None):
            allowed = "the column of the text to write" if columns.has_target else "None"
            raise self._error("dataset.target_column", data.target_column, f"{allowed} for {task}")
        if columns.num_texts and len(data.text_columns) not in columns.num_texts:
            allowed = "two columns, of the question and of the context," if 2 in columns.num_texts else "one column"
            raise self._error("dataset.text_columns", list(data.text_columns), f"{allowed} for {task}")
        if not columns.num_texts and data.text_columns != DatasetConfig.text_columns:
            raise self._error("dataset.text_columns", list(data.text_columns), f"none for {task}")
        label = data.label_column or columns.label
        if task.endswith("classification") and columns.num_texts and label in data.text_columns:
            raise self._error("dataset.label_column", label, f"another column than those of texts for {task}")
        unread = {
            "label_column": columns.label is None,
            "image_column": not columns.has_image,
            "flip": not columns.has_image,
            "max_length": columns.has_image,
            "prefix": not columns.has_target,
            "stride": task != "question-answering",
        }
        for name, is_unread in unread.items():
            if is_unread and getattr(data, name):
                raise self._error(f"dataset.{name}", getattr(data, name), f"None for {task}")


@dataclass(frozen=True, kw_only=True)
class PlainRun(Recipe):
    """The run of a stage that only trains."""


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Config) else value
