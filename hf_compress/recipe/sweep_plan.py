"""Which runs a sweep is made of, and which of their stages are the same."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_compress.config import Recipe, SweepConfig
from hf_compress.config.base import read_file
from hf_compress.config.recipe import PlainRun
from hf_compress.errors import ConfigError
from hf_compress.recipe.output import check_output, make_output, stored_data
from hf_compress.recipe.overrides import change_setting, check_effect, plain_copy
from hf_compress.recipe.stages import Stage, stages_of


@dataclass(frozen=True)
class PlannedRun:
    """One training of a recipe."""

    name: str
    """Name of the settings."""

    seed: int

    settings: Mapping[str, Any]
    """What they change in the sweep's recipe."""

    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return Path(str(self.recipe.output))

    @property
    def key(self) -> str:
        """Name of the folder."""
        return self.folder.name


def with_recipe(config: SweepConfig) -> SweepConfig:
    """Return the sweep with its recipe's fields in place of the path of a file.

    Raises:
        ConfigError: If the file cannot be read.
    """
    given = config.recipe
    data = read_file(Path(given), Recipe.__name__) if isinstance(given, str) else dict(given)
    return replace(config, recipe=plain_copy(data))


def plan_run(config: SweepConfig, output: Path, name: str, settings: Mapping[str, Any]) -> list[PlannedRun]:
    """Return one run for each seed.

    Args:
        config: The sweep, see ``with_recipe``.
        output: Its output folder.
        name: Name of the settings.
        settings: What to change in the recipe.

    Raises:
        ConfigError: If a setting does not exist, or the recipe that results is not valid.
    """
    return [_planned(config, output, name, settings, seed) for seed in config.seeds or (None,)]


def _planned(config: SweepConfig, output: Path, name: str, settings: Mapping[str, Any], seed: int | None) -> PlannedRun:
    data: dict[str, Any] = plain_copy(dict(config.recipe))  # type: ignore[arg-type]
    data["output"] = None
    try:
        for setting, value in settings.items():
            change_setting(data, setting, plain_copy(value), setting)
        if seed is not None:
            _set_seed(data, seed)
        recipe = Recipe.from_dict(data)
        for setting in settings:
            check_effect(recipe, setting, setting)
        if recipe.hub_model_id is not None:
            raise ConfigError(
                f"Recipe.hub_model_id: got {recipe.hub_model_id!r}; allowed: None in a sweep, whose runs would replace "
                "each other there. Push the one you choose: hf-compress push FOLDER OWNER/NAME."
            )
    except ConfigError as error:
        raise ConfigError(f"SweepConfig, run {name!r}: {error}") from error
    used = (recipe.training or {}).get("seed", TrainingArguments.seed)
    return PlannedRun(name, used, settings, replace(recipe, output=str(output / f"{name}-seed{used}")))


def _set_seed(data: dict[str, Any], seed: int) -> None:
    change_setting(data, "training.seed", seed, "seeds")
    stages = data.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        training = stage.get("training") if isinstance(stage, dict) else None
        if isinstance(training, dict) and "seed" in training:
            training["seed"] = seed


def share_stages(run: PlannedRun, others: Iterable[PlannedRun]) -> None:
    """Give a run what another one has trained for it already: leading stages that only train, by the same settings.

    Their folders are copied; weights are linked where the file system has links, since nothing changes them. A run that
    is new gets its recipe file and the mark that it has begun first, so that its folder is known as its own, and what
    the other one knows of the data that it was trained on.
    """
    theirs = {
        settings: stage for other in others for settings, stage in _plain_stages(other).items() if stage.is_finished()
    }
    check_output(run.recipe, resume=True)
    for settings, stage in _plain_stages(run).items():
        found = theirs.get(settings)
        if found is None or stage.is_finished():
            continue
        make_output(run.recipe, run.folder, stored_data(found.folder.parent))
        partial = stage.folder.with_name(f"{stage.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(found.folder, partial, copy_function=_link_or_copy)
        os.replace(partial, stage.folder)


def _plain_stages(run: PlannedRun) -> dict[str, Stage]:
    """Return the leading stages that only train, by all that they depend on: their settings, and those before them."""
    found: dict[str, Stage] = {}
    before: list[Mapping[str, Any]] = []
    for stage in _leading(stages_of(run.recipe, run.folder)):
        settings = {**stage.recipe.to_dict(), "output": None}
        if before:
            settings["model"] = None  # that of the stage before, whose folder has another name in every run
        before = [*before, settings]
        found[json.dumps([run.seed, *before], sort_keys=True)] = stage  # the recipe's own seed chooses the examples
    return found


def _leading(stages: Sequence[Stage]) -> Sequence[Stage]:
    number = next((n for n, stage in enumerate(stages) if not isinstance(stage.recipe, PlainRun)), len(stages))
    return stages[:number]


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without links
    shutil.copy2(source, target)
