"""The training runs of a recipe in a row, and what each leaves behind."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import WEIGHTS, Recipe
from hf_compress.config.recipe import PlainRun
from hf_compress.errors import CompressionError, ConfigError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.model import dimension_groups
from hf_compress.instruments.quantize import attached_quantizers
from hf_compress.ptq.stored import calibration_config
from hf_compress.reading import are_texts, is_count, is_number, read_json
from hf_compress.recipe.result import CHECKPOINTS
from hf_compress.shrinking.depth import renamed

SMALL = "compressed"
"""Name and folder of what the last run leaves."""

FACTS_FILE = "stage.json"
STEPS_FILE = "quantization.json"
HISTORY_FILE = "log_history.json"


@dataclass(frozen=True)
class TrackedGroup:
    """A dimension group of the dense model, followed through all runs."""

    kind: str
    name: str
    """In the dense model."""

    total: int
    """Units there."""

    kept: int
    """Units that are left."""

    now: str | None
    """Name in the model that a run left, or None if the group went with its layer."""

    pruned: bool = False
    """Whether any run chose among its units."""


def track(groups: Iterable[DimensionGroup]) -> tuple[TrackedGroup, ...]:
    """Return the groups of a model from which nothing has gone yet."""
    return tuple(TrackedGroup(g.kind, g.name, g.num_units, g.num_units, g.name) for g in groups)


def tracked_after(
    tracked: Iterable[TrackedGroup], groups: Iterable[DimensionGroup], masks: Mapping[str, Tensor]
) -> tuple[TrackedGroup, ...]:
    """Return what is left of the dense model's groups after a run.

    Args:
        tracked: What was left before.
        groups: Groups of the model that the run began with.
        masks: What the run kept of them.
    """
    layers = {
        group.modules[0].rpartition(".")[0]: masks[group.name].nonzero().flatten().tolist()
        for group in groups
        if group.modules and group.name in masks
    }
    found = []
    for each in tracked:
        mask = masks.get(each.now) if each.now is not None else None
        if mask is not None and len(mask) == each.kept:
            each = replace(each, kept=int(mask.sum()), pruned=True)
        now = renamed(each.now, layers) if each.now is not None else None
        found.append(replace(each, now=now) if now is not None else replace(each, now=None, kept=0))
    return tuple(found)


@dataclass(frozen=True)
class Facts:
    """What is known about a finished run, beside its model."""

    metrics: Mapping[str, float]
    """What ``trainer.evaluate()`` returned after training."""

    optimizer_steps: int

    tracked: tuple[TrackedGroup, ...] = field(default=())
    """Groups of the dense model, if this or an earlier run pruned."""

    notes: tuple[str, ...] = ()
    """The stage's notes."""

    def kept_units(self) -> dict[str, list[dict[str, Any]]]:
        """Return what is left of the groups that were pruned, as ``Results.kept`` wants it."""
        found: dict[str, list[dict[str, Any]]] = {}
        for each in self.tracked:
            if each.pruned:
                unit = {"name": each.name, "kept": each.kept, "total": each.total}
                found.setdefault(each.kind, []).append(unit)
        return found

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the facts from a file.

        Raises:
            ConfigError: If it is missing or damaged.
        """
        try:
            data = read_json(path)
            tracked, notes = tuple(TrackedGroup(**each) for each in data["tracked"]), data.get("notes", [])
            if not are_texts(notes):
                raise TypeError("notes are no list of texts")
            found = cls(**{**data, "tracked": tracked, "notes": tuple(notes)})
            if not is_count(found.optimizer_steps) or not all(map(is_number, dict(found.metrics).values())):
                raise TypeError("optimizer_steps and metrics are no numbers")
            if not all(is_count(each.total) and is_count(each.kept) for each in found.tracked):
                raise TypeError("units of tracked groups are no whole numbers")
            return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: is damaged ({error!r}). Delete its folder and resume to make it again."
            ) from error


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe."""

    name: str
    recipe: Recipe
    """Without stages; its model is what the run before it left."""

    folder: Path
    """Gets the model, its tokenizer, ``stage.json``, ``log_history.json`` and, if it was quantized,
    ``quantization.json`` once the run is over: a folder that exists is finished."""

    checkpoints: Path

    notes: tuple[str, ...] = ()
    """What the stage does that its settings do not say."""

    def is_finished(self) -> bool:
        """Return whether the stage's result is there."""
        return self.folder.is_dir()

    @property
    def steps(self) -> Path:
        """Return where the steps of a model that was trained with integers lie, see ``calibration_config``."""
        return self.folder / STEPS_FILE

    def facts(self) -> Facts:
        """Return what is known about the finished run."""
        return Facts.load(self.folder / FACTS_FILE)

    def shrinks(self) -> bool:
        """Return whether training makes matrices smaller: single weights become zeros."""
        pruning = None if self.recipe.oneshot_batches is not None else self.recipe.pruning
        return pruning is not None and any(kind != WEIGHTS for kind in pruning.structures)

    def shrink_options(self) -> dict[str, Any]:
        """Return the recipe's options for ``shrink``."""
        options = {} if self.recipe.shrink is None else self.recipe.shrink.to_dict()
        options.pop("schema_version", None)
        return options

    def save(self, small: PreTrainedModel, processor: Any, facts: Facts, history: Sequence[Mapping[str, Any]]) -> None:
        """Save everything under another name first, so that a killed process leaves no half of a result.

        Args:
            small: The model.
            processor: Its tokenizer or image processor.
            facts: About the run.
            history: What the Trainer logged; checkpoints, which hold it as well, may be off or deleted.
        """
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        small.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=2), encoding="utf-8")
        (partial / HISTORY_FILE).write_text(json.dumps(history), encoding="utf-8")
        if any(each.grid is not None for each in attached_quantizers(small).named().values()):
            (partial / STEPS_FILE).write_text(json.dumps(calibration_config(small)), encoding="utf-8")
        os.replace(partial, self.folder)


def stages_of(recipe: Recipe, output: Path) -> Sequence[Stage]:
    """Return the runs of a recipe in their order: ``stage-1`` and so on, the last one ``compressed``.

    Args:
        recipe: With or without stages.
        output: Its output folder.
    """
    runs = recipe.runs()
    found: list[Stage] = []
    dense = recipe.model
    for number, run in enumerate(runs, 1):
        name = SMALL if number == len(runs) else f"stage-{number}"
        checkpoints = output / CHECKPOINTS
        if recipe.stages is not None:
            checkpoints = checkpoints / f"stage-{number}"
        begins_with = replace(run, model=str(found[-1].folder)) if found else run
        found.append(Stage(name, begins_with.with_dense(dense), output / name, checkpoints))
        if all(isinstance(each.recipe, PlainRun) for each in found):
            dense = str(found[-1].folder)
    return found


def with_what_is_left(stage: Stage, earlier: Iterable[Stage], model: PreTrainedModel) -> Stage:
    """Return a stage without the structures of which earlier ones have left nothing to choose from, with a note.

    Where structures share a budget, it may take all there is of one, such as all heads but one of a layer, or those as
    well. Structures with targets of their own stay, and so does what no earlier stage pruned.

    Args:
        stage: The stage.
        earlier: Those before it.
        model: What they left.
    """
    pruning = stage.recipe.pruning
    if pruning is None or isinstance(pruning.structures, Mapping):
        return stage
    pruned = {kind for each in earlier if each.recipe.pruning is not None for kind in each.recipe.pruning.structures}
    if not pruned.intersection(pruning.structures):
        return stage
    left = {WEIGHTS, *(group.kind for group in dimension_groups(model))}
    gone = tuple(kind for kind in pruning.structures if kind in pruned and kind not in left)
    remaining = tuple(kind for kind in pruning.structures if kind not in gone)
    if not gone or not remaining:
        return stage
    note = (
        f"{stage.name}: earlier stages have left no {', '.join(gone)} to choose from; the budget is met with "
        f"{', '.join(remaining)} alone."
    )
    recipe = replace(stage.recipe, pruning=replace(pruning, structures=remaining))
    return replace(stage, recipe=recipe, notes=(*stage.notes, note))


@contextmanager
def naming(recipe: Recipe, stage: Stage) -> Iterator[None]:
    """Put the name of a stage before the errors inside, if the recipe has stages.

    Args:
        recipe: The whole recipe.
        stage: One of its stages.
    """
    try:
        yield
    except CompressionError as error:
        if recipe.stages is None:
            raise
        raise type(error)(f"{stage.name}: {error}") from error


def dense_model(recipe: Recipe, stages: Sequence[Stage]) -> tuple[str, Sequence[Stage]]:
    """Return what a recipe compresses, and the stages that do it: those after any that only train at first."""
    plain = 0
    while plain < len(stages) and isinstance(stages[plain].recipe, PlainRun):
        plain += 1
    return (str(stages[plain - 1].folder) if plain else str(recipe.model)), stages[plain:]
