"""What the training scripts have in common: arguments in the manner of Transformers' examples, and a recipe file.

Arguments that are given take the place of what the recipe says, in every stage if it has stages: each of them is a
training run of its own, so ``--num_train_epochs 2`` and ``--max_steps 100`` are the length of each. ``--recipe`` alone
says how to compress.
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
from transformers.hf_argparser import string_to_bool

from hf_compress import CompressionError, ConfigError, Recipe, RunResult, run_recipe
from hf_compress.errors import message_of
from hf_compress.reading import read_json
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
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name of the data set, or a folder; the recipe's splits and columns do not hold for it"},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    data_file: str | None = field(
        default=None,
        metadata={"help": "instead of --dataset_name: a .csv, .tsv, .json, .jsonl, .parquet or .txt file"},
    )
    train_file: str | None = field(default=None, metadata={"help": "another name of --data_file"})
    validation_file: str | None = field(
        default=None, metadata={"help": "evaluate on this file; without it, on a tenth of --data_file"}
    )
    train_split: str | None = field(default=None, metadata={"help": "split to train on (default: train)"})
    eval_split: str | None = field(default=None, metadata={"help": "split to evaluate on (default: test, validation)"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many examples only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on so many examples only"})
    export: str | None = field(default=None, metadata={"help": "save the result in this integer format as well"})
    dry_run: bool = field(default=False, metadata={"help": "load and check everything, say what would be done, stop"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output_dir, after a kill"})


COMMON = {
    "validation_file": "eval_file",
    "train_split": "train_split",
    "eval_split": "eval_split",
    "max_train_samples": "max_train_examples",
    "max_eval_samples": "max_eval_examples",
    "dataset_config_name": "name",
}
"""Argument -> field of the recipe's data set."""

SOURCES = ("dataset_name", "data_file", "train_file", "task_name")
"""Arguments that name the data."""

OF_THE_DATA = (
    "path", "name", "eval_file", "train_split", "eval_split", "text_columns", "label_column", "target_column",
    "image_column",
)  # fmt: skip
"""Fields of the recipe's data set that mean nothing to another one; lengths, prefix and the like hold for any."""

UNKNOWN = {
    "overwrite_output_dir": "Nothing is overwritten: delete the folder, choose another one, or go on with --resume.",
    "trust_remote_code": "Code of models and data sets is never run. Load them yourself and save them in a folder.",
    "streaming": "Data are read as a whole. Choose a part by --max_train_samples, or save one in a folder.",
    "test_file": "A recipe evaluates on one split. Give --validation_file.",
    "do_predict": "A recipe predicts nothing; load the saved model.",
}
"""Arguments that Transformers' examples have and these scripts do not -> what to do."""

ALWAYS = ("do_train", "do_eval")
"""Arguments that ask for what a recipe does anyway."""

DESCRIPTION = (
    "Arguments take the place of what the recipe says. In a recipe with stages, training arguments hold for every "
    "stage, each of which is a training run: --num_train_epochs and --max_steps are the length of each stage, repeats "
    "counted one by one. To change one stage alone: hf-compress run RECIPE --set stages.0.training.NAME=VALUE."
)

LENGTHS = ("num_train_epochs", "max_steps")
"""Training arguments that say how long a run is: one that is given takes the place of both."""

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
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        given = parse(task, kind, sys.argv[1:] if arguments is None else arguments)
        recipe, resume = build_recipe(task, kind, columns, given)
        result = run_recipe(recipe, dry_run=given["dry_run"], resume=resume)
    except (CompressionError, OSError) as error:
        sys.stderr.write(f"error: {message_of(error)}\n")
        sys.exit(2)
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)
    return result


def parse(task: str, kind: type, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that were given; of training arguments no defaults, which would hide the recipe's.

    Raises:
        ConfigError: If one is not for these scripts.
    """
    training = TASKS_BY_NAME[task].arguments_class
    parser = HfArgumentParser([RecipeArguments, kind, training], description=DESCRIPTION, allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    names = {each.name for each in fields(training)}
    for action in parser._actions:
        if action.dest in names:
            action.default, action.required = argparse.SUPPRESS, False
        if action.dest in UNKNOWN:
            action.help = argparse.SUPPRESS
        if action.dest in ALWAYS:
            action.help = "a recipe always does"
        if action.dest == "resume_from_checkpoint":
            action.help = "true: the same as --resume"
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        arguments = [text for name, value in _stored(arguments[0]).items() for text in _as_arguments(name, value)]
    _refuse_unknown(arguments)
    if not {"-h", "--help"} & set(arguments):
        parser.usage = "%(prog)s --recipe FILE --output_dir FOLDER [--NAME VALUE ...], see --help"
    return vars(parser.parse_args(list(arguments)))


def _refuse_unknown(arguments: Sequence[str]) -> None:
    for text in arguments:
        name = text.partition("=")[0].removeprefix("--")
        if text.startswith("--") and name in UNKNOWN:
            raise ConfigError(f"--{name}: not for recipes. {UNKNOWN[name]}")


def _stored(path: str) -> dict[str, Any]:
    """Return arguments of a file, as Transformers' examples take them."""
    try:
        found = read_json(Path(path))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, no object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}. Give a .json file of one object, whose keys are arguments without "
            "dashes, or a recipe by --recipe."
        ) from error
    return found


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
    resume = _resumes(training.pop("resume_from_checkpoint", None)) or given["resume"]
    for name in ALWAYS:
        if training.pop(name, True) is not True:
            raise ConfigError(f"--{name}: got false; allowed: true, since a recipe always trains and evaluates.")
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
    stored["training"] = {**_without(stored.get("training"), training), **training} or None
    for stage in stored.get("stages") or ():
        stage["training"] = _without(stage.get("training"), training) or None
    return Recipe.from_dict(stored), resume


def _resumes(given: str | None) -> bool:
    """Return whether to resume; Transformers takes folders as well, which stages have one each of."""
    if given is None:
        return False
    try:
        return bool(string_to_bool(given))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(
            f"--resume_from_checkpoint: got {given!r}; allowed: true or false. A run goes on in --output_dir, in the "
            "stage that is not finished, from its newest complete checkpoint."
        ) from error


def _without(stored: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored training arguments without those that others have taken the place of."""
    gone = {*given, *(LENGTHS if any(name in given for name in LENGTHS) else ())}
    return {name: value for name, value in (stored or {}).items() if name not in gone}


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
    sources = [name for name in SOURCES if given.get(name) is not None]
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in sources)}: got both; give one.")
    changes = {**columns, **{name: given[argument] for argument, name in COMMON.items() if given[argument] is not None}}
    if sources and "path" not in columns:
        changes["path"] = given[sources[0]]
    found = {name: value for name, value in changes.items() if value is not None}
    if "path" in found:
        stored = {name: value for name, value in stored.items() if name not in OF_THE_DATA}
    found = {**stored, **found}
    if "path" not in found:
        raise ConfigError("--dataset_name: missing; name a data set here, by --data_file, or in the recipe.")
    return found
