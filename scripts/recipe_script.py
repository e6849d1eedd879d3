"""What the training scripts have in common: arguments in the manner of Transformers' examples, and a recipe file.

Arguments that are given take the place of what the recipe says; ``--recipe`` alone says how to compress.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import transformers
from transformers import HfArgumentParser

from hf_compress import CompressionError, ConfigError, Recipe, RunResult, run_recipe
from hf_compress.recipe.overrides import load_recipe
from hf_compress.recipe.tasks.table import TASKS_BY_NAME


@dataclass
class RecipeArguments:
    """What to compress, and how."""

    recipe: str = field(metadata={"help": "recipe file, .yaml or .json: pruning, quantization, distillation, stages"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the model"})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the teacher, or self, unmasked, dense"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name of the data set, or a folder"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    data_file: str | None = field(
        default=None, metadata={"help": "instead of --dataset_name: a .csv, .tsv, .json, .jsonl, .parquet or .txt file"}
    )
    train_split: str | None = field(default=None, metadata={"help": "split to train on (default: train)"})
    eval_split: str | None = field(default=None, metadata={"help": "split to evaluate on (default: test, validation)"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many examples only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on so many examples only"})
    export: str | None = field(default=None, metadata={"help": "save the result in this integer format as well"})
    dry_run: bool = field(default=False, metadata={"help": "load and check everything, say what would be done, stop"})


COMMON = {
    "train_split": "train_split",
    "eval_split": "eval_split",
    "max_train_samples": "max_train_examples",
    "max_eval_samples": "max_eval_examples",
    "dataset_config_name": "name",
}
"""Argument -> field of the recipe's data set."""

Columns = Callable[[Any], dict[str, Any]]
"""Makes fields of the recipe's data set of the task's own arguments; None where the recipe is to say it."""


def main(task: str, kind: type, columns: Columns, arguments: Sequence[str] | None = None) -> RunResult:
    """Parse the command line, run the recipe, and print what came of it.

    Args:
        task: The recipe's task.
        kind: Dataclass of the task's own arguments.
        columns: See ``Columns``.
        arguments: The command line; the process's own by default.

    Raises:
        SystemExit: With 2, after one message, if anything is wrong with the arguments or the run.
    """
    given = parse(task, kind, sys.argv[1:] if arguments is None else arguments)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        recipe, resume = build_recipe(task, kind, columns, given)
        result = run_recipe(recipe, dry_run=given["dry_run"], resume=resume)
    except CompressionError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)
    return result


def parse(task: str, kind: type, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that were given; of training arguments no defaults, which would hide the recipe's."""
    training = TASKS_BY_NAME[task].arguments_class
    parser = HfArgumentParser([RecipeArguments, kind, training])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    names = {each.name for each in fields(training)}
    for action in parser._actions:
        if action.dest in names:
            action.default, action.required = argparse.SUPPRESS, False
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        stored = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        arguments = [text for name, value in stored.items() for text in _as_arguments(name, value)]
    return vars(parser.parse_args(list(arguments)))


def _as_arguments(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(each) if isinstance(each, bool | dict) else str(each) for each in values)]


def build_recipe(task: str, kind: type, columns: Columns, given: Mapping[str, Any]) -> tuple[Recipe, bool]:
    """Return the recipe that the command line comes to, and whether to resume.

    Raises:
        ConfigError: If arguments do not go together, or the recipe is not valid.
    """
    stored = load_recipe(given["recipe"]).to_dict()
    if stored.get("task") not in (None, task):
        raise ConfigError(f"{given['recipe']}: is for {stored['task']}, this script for {task}. Use the other script.")
    own = {each.name for each in (*fields(RecipeArguments), *fields(kind))}
    training = {name: value for name, value in given.items() if name not in own}
    output = training.pop("output_dir", None) or stored.get("output")
    resume = bool(training.pop("resume_from_checkpoint", False))
    changes = {
        "task": task,
        "model": given["model_name_or_path"],
        "teacher": given["teacher_name_or_path"],
        "export": given["export"],
        "output": output,
        "dataset": _data(stored.get("dataset") or {}, columns(SimpleNamespace(**given)), given),
    }
    stored |= {name: value for name, value in changes.items() if value is not None}
    stored |= _upload(stored, training)
    stored["training"] = {**(stored.get("training") or {}), **training} or None
    return Recipe.from_dict(stored), resume


def _upload(stored: Mapping[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Take what Transformers' arguments say of the Hub out of them; return the recipe's fields for it.

    The Trainer would upload weights of the dense model's size; the recipe uploads what it has made of them.
    """
    push, name, private = (training.pop(key, None) for key in ("push_to_hub", "hub_model_id", "hub_private_repo"))
    if push is False:
        if name is not None or private:
            raise ConfigError("--push_to_hub: got false beside a repository; leave one of them out.")
        return {"hub_model_id": None, "hub_private": False}
    name = name or stored.get("hub_model_id")
    if push and name is None and stored.get("output"):
        name = Path(stored["output"]).resolve().name  # as the Trainer does
    if private is not None and name is None:
        raise ConfigError("--hub_private_repo: has no effect without an upload; give --push_to_hub or --hub_model_id.")
    return {"hub_model_id": name, "hub_private": bool(stored.get("hub_private") if private is None else private)}


def _data(stored: Mapping[str, Any], columns: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    if given["dataset_name"] is not None and given["data_file"] is not None:
        raise ConfigError("--dataset_name and --data_file: got both; give one.")
    changes = {"path": given["dataset_name"] or given["data_file"], **columns}
    changes |= {name: given[argument] for argument, name in COMMON.items()}
    if changes["path"] is not None:  # another data set has splits and columns of its own
        stored = {}
    found = {**stored, **{name: value for name, value in changes.items() if value is not None}}
    if "path" not in found:
        raise ConfigError("--dataset_name: missing; name a data set here, by --data_file, or in the recipe.")
    return found
