"""What a recipe and each of its stages have in common: the sections of the methods, and training arguments."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_compress.config.base import Config
from hf_compress.config.distillation import DistillationConfig
from hf_compress.config.pruning import PruningConfig
from hf_compress.config.quantization import QuantizationConfig
from hf_compress.config.structures import WEIGHTS
from hf_compress.errors import ConfigError, choices

METHODS: dict[str, type[Config]] = {
    "pruning": PruningConfig,
    "quantization": QuantizationConfig,
    "distillation": DistillationConfig,
}
"""Sections that say what is done to the model; one is needed at least."""

_UPLOAD = "Set the recipe's hub_model_id, and hub_private: the compressed model is uploaded when the run is over. "
_UPLOAD += "A Trainer would upload weights of the dense model's size."
_NOT_HERE = {
    "output_dir": "Set the recipe's output; checkpoints go to a folder in it.",
    "resume_from_checkpoint": "Run with --resume, or run_recipe(..., resume=True).",
    "do_train": "A recipe always trains, evaluates and saves.",
    "do_eval": "Set eval_strategy to evaluate while training; a recipe always evaluates at the end.",
    "do_predict": "A recipe predicts nothing; load the saved model.",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": f"{_UPLOAD} For a branch, call hf-compress push --revision.",
    "hub_token": "Recipes are uploaded with their models. Log in with `hf auth login`, or set HF_TOKEN.",
}
"""Fields of TrainingArguments that a recipe has another way for -> that way."""

_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
"""Fields that transformers takes as they are, and that end in an error once training has begun."""


def build_sections(config: Config, kinds: Mapping[str, type[Config]]) -> None:
    """Turn the mappings in a config's fields into configs of their own.

    Raises:
        ConfigError: If a field holds anything but such a config, a mapping of its fields, or None.
    """
    for name, kind in kinds.items():
        value = getattr(config, name)
        if isinstance(value, Mapping):
            object.__setattr__(config, name, kind.from_dict(value))
        elif value is not None and not isinstance(value, kind):
            raise _wrong(config, name, value, f"a {kind.__name__}, a mapping of its fields, or None")


def check_sections(config: Any) -> None:
    """Check that what is done before and beside training goes with the methods of a recipe or a stage.

    Raises:
        ConfigError: If not.
    """
    if config.oneshot_batches is not None:
        config._check_count("oneshot_batches")
        if config.pruning is None:
            raise _wrong(config, "oneshot_batches", config.oneshot_batches, "None without a pruning section")
        if WEIGHTS in config.pruning.structures:
            raise ConfigError(
                f"{type(config).__name__}.oneshot_batches: prunes single weights, which training then overwrites. Call "
                "prune_oneshot on the finished model, or leave oneshot_batches out."
            )
    prunes_in_training = config.pruning is not None and config.oneshot_batches is None
    if config.lora is not None and (prunes_in_training or config.quantization is not None):
        raise ConfigError(
            f"{type(config).__name__}.lora: adapters are merged after training, which changes what pruning and "
            "quantization in training chose. Set oneshot_batches, or put them into a stage of their own."
        )


def check_training(config: Any, task: str | None) -> None:
    """Check the field ``training`` of a recipe or a stage, and keep a copy of it.

    Args:
        config: Has the field.
        task: The recipe's task, which says which arguments there are.

    Raises:
        ConfigError: If a name is unknown or has another place in a recipe, or a value has another type.
    """
    if config.training is None:
        return
    if not isinstance(config.training, Mapping):
        raise _wrong(config, "training", config.training, "a mapping of TrainingArguments fields, or None")
    where = f"{type(config).__name__}.training"
    kind = Seq2SeqTrainingArguments if task == "seq2seq-lm" else TrainingArguments
    fields = {field.name: field.default for field in dataclasses.fields(kind) if field.init}
    known = set(fields) - set(_NOT_HERE)
    for key, value in config.training.items():
        if key in _NOT_HERE:
            raise ConfigError(f"{where}: {key!r} has no place in a recipe. {_NOT_HERE[key]}")
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {choices(key, known)}.")
        # TrainingArguments checks no types, so that a wrong one would come up somewhere in the run.
        default = fields[key]
        if isinstance(default, bool) and not isinstance(value, bool):
            raise _wrong(config, f"training.{key}", value, "true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, int | float) and not isinstance(default, bool) and not number:
            raise _wrong(config, f"training.{key}", value, "a number")
        if key in _COUNTS and not (isinstance(value, int) and value >= 1):
            raise _wrong(config, f"training.{key}", value, "an int >= 1")
        if number and (math.isnan(value) or (key == "learning_rate" and not 0 <= value < math.inf)):
            allowed = "a finite number >= 0" if key == "learning_rate" else "a number other than NaN"
            raise _wrong(config, f"training.{key}", value, allowed)
    object.__setattr__(config, "training", dict(config.training))


def _wrong(config: Config, name: str, given: object, allowed: str) -> ConfigError:
    return ConfigError(f"{type(config).__name__}.{name}: got {given!r}; allowed: {allowed}.")
