"""``prune_oneshot``: from a trained model and a few batches to masks, without training."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import WEIGHTS, PruningConfig
from hf_compress.errors import ConfigError, TargetError, choices
from hf_compress.graph.accept import check_model, remedy_for
from hf_compress.graph.capture import evaluating
from hf_compress.graph.fake import has_no_weights
from hf_compress.graph.model import ModelGraph
from hf_compress.oneshot import kwon, obs, scores, weights
from hf_compress.oneshot.calibration import Calibration
from hf_compress.oneshot.linear import all_or_nothing
from hf_compress.oneshot.request import Found, Job, find_targets
from hf_compress.shrinking.plan import refuse_compressed

GATED = ("heads", "ffn", "hidden", "head_dim", "other", "layers")
"""Structures whose units can be gated; experts act through a router alone."""

LINEAR = ("heads", "ffn", "hidden", "head_dim", "other")
"""Structures whose units linear layers may read."""


@dataclass(frozen=True)
class Criterion:
    """How one criterion works on units, or on single weights."""

    units: Callable[[Job], Found] | None = None
    structures: tuple[str, ...] = ()
    """What ``units`` works on."""

    weights: Callable[[Job], Found] | None = None
    compares: bool = True
    """Whether single weights of different layers can be compared."""

    def works_on(self) -> tuple[str, ...]:
        """Return all structures that it works on."""
        return self.structures if self.weights is None else (*self.structures, WEIGHTS)


WHOLE = (*LINEAR, "experts")
CRITERIA = {
    "level": Criterion(scores.magnitude, WHOLE, weights.remove_small),
    "l1": Criterion(scores.magnitude, WHOLE, weights.remove_small),
    "l2": Criterion(scores.magnitude, WHOLE, weights.remove_small),
    "fpgm": Criterion(scores.magnitude, WHOLE),
    "wanda": Criterion(scores.wanda, LINEAR, weights.remove_by_inputs, compares=False),
    "obs": Criterion(obs.remove_units, LINEAR, weights.remove_and_update, compares=False),
    "kwon": Criterion(kwon.search_and_tune, ("heads", "ffn")),
    "taylor": Criterion(scores.gate_gradients, GATED),
    "taylor2": Criterion(scores.gate_gradients, GATED),
    "fisher": Criterion(scores.gate_gradients, GATED),
    "block_influence": Criterion(scores.block_influence, ("layers",)),
}
"""The criteria that need no training."""

WHILE_TRAINING = (
    *("schedule", "power", "milestones", "initial_sparsity", "begin", "end", "update_every", "score_decay", "regrow"),
    "rules",
)
"""Settings that have no effect without training."""


ZEROS = (
    "Training and merged adapters overwrite these zeros. To keep them, train with a PruningCallback of the same "
    'sparsity with criterion="level", schedule="one_shot", begin=0, end=1, and a step of warm-up.'
)
"""What must be known of single weights that are zero."""


@dataclass(frozen=True, eq=False)
class OneShotResult:
    """What is to go, and what was done."""

    masks: dict[str, Tensor]
    """By group name: bool [num_units], True = keep. ``shrink(model, result.masks)`` removes the rest."""

    weight_masks: dict[str, Tensor]
    """By parameter name: bool, of the parameter's shape, True = keep; the others are zero in the model now."""

    scores: dict[str, Tensor]
    """By group name: [num_units], higher = keep; what the criterion measured."""

    changed: tuple[str, ...]
    """Names of the parameters that were changed in place."""

    def summary(self) -> str:
        """Say how much goes, one line a group or weight; and of single weights, what becomes of the zeros."""
        masks = {**self.masks, **self.weight_masks}
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        lines = [f"{name}: keeps {kept[name]:,} of {mask.numel():,}" for name, mask in masks.items()]
        return "\n".join([*lines, ZEROS] if self.weight_masks else lines)


def prune_oneshot(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Any]],
    config: PruningConfig,
    *,
    num_batches: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> OneShotResult:
    """Choose what a trained model can do without, from a few batches, without training.

    ``obs`` also updates the weights that read the units which go, and ``kwon`` scales those of the units that stay;
    single weights (``structures={"weights": ...}``) become zero. Everything else leaves the model as it was, and so
    does every criterion if an error comes up on the way.

    Nothing keeps the zeros among single weights: training and merged adapters overwrite them without a word. Merge
    adapters first. To train on, use ``PruningCallback`` with the same structures, granularity, allocation and exclude,
    and ``criterion="level", schedule="one_shot", begin=0, end=1``: the zeros, which are the smallest weights, are what
    it removes after the first step. ``TrainingArguments(warmup_steps=1)`` makes the learning rate of that step 0;
    without, zeros may change places with other small weights.

    Args:
        model: The model; wherever it is, in whatever mode.
        dataloader: Gives mappings of forward arguments, padding marked by ``attention_mask``; a few hundred examples
            are enough. ``taylor``, ``fisher`` and ``kwon`` need labels.
        config: Which structures, how much, by which criterion of ``CRITERIA``; nothing that says when.
        num_batches: Take no more batches than these.
        example_inputs: Keyword arguments for one forward pass, only to analyze the model; made from its config by
            default.

    Returns:
        Masks for ``shrink``, scores, and what was changed.

    Raises:
        ConfigError: For settings that do not go together or have no effect, and batches that are none.
        TargetError: If the model lacks what is asked for, or weights, scores or what batches give are not finite; the
            message says which.
        GraphError: If the model cannot be analyzed.
    """
    _check_config(config)
    check_prunable("prune_oneshot", model, example_inputs)
    graph = ModelGraph(model, example_inputs)
    single = WEIGHTS in config.structures
    find = CRITERIA[config.criterion].weights if single else CRITERIA[config.criterion].units
    assert find is not None
    targets = find_targets(model, graph, config)
    with all_or_nothing() as undo, evaluating(model):
        calibration = Calibration(model, dataloader, num_batches)
        job = Job(config=config, model=model, graph=graph, targets=targets, calibration=calibration, undo=undo)
        found = find(job)
    return OneShotResult(
        masks={} if single else found.masks,
        weight_masks=found.masks if single else {},
        scores=found.scores,
        changed=undo.names(model),
    )


def check_prunable(caller: str, model: Any, example_inputs: Any) -> None:
    """Check that a model has weights of its own that can be pruned.

    Args:
        caller: The function that was called, for messages.
        model: What it was given as the model.
        example_inputs: What it was given to run it on.

    Raises:
        TargetError: If it is no transformers model, or has no weights.
        ShrinkError: If it is quantized.
    """
    if not isinstance(model, PreTrainedModel):
        remedy = remedy_for(model)
        raise TargetError(
            f"{caller}: got {type(model).__name__}; allowed: a transformers PreTrainedModel."
            + (f" {remedy[0].upper()}{remedy[1:]}" if remedy is not None else "")
        )
    check_model(model, example_inputs)
    refuse_compressed(model)
    if has_no_weights(model):
        raise TargetError(f"{caller}: the model is on the meta device. Load it with from_pretrained.")


def _check_config(config: Any) -> None:
    """Check that the criterion can do what is asked for, and that no setting is without effect."""
    if not isinstance(config, PruningConfig):
        raise ConfigError(f"prune_oneshot: config is a {type(config).__name__}; pass a PruningConfig.")
    if config.criterion not in CRITERIA:
        known = choices(config.criterion, CRITERIA)
        raise ConfigError(f"PruningConfig.criterion: {config.criterion!r} needs training; without, {known}.")
    method = CRITERIA[config.criterion]
    for kind in config.structures:
        if kind not in method.works_on():
            known = choices(kind, method.works_on())
            raise ConfigError(
                f"PruningConfig.structures: {config.criterion!r} does not work on {kind!r} without training; {known}."
            )
    single = WEIGHTS in config.structures
    if single and len(config.structures) > 1:
        raise ConfigError(
            "PruningConfig.structures: 'weights' beside other structures, which would remove what is zeroed. Remove "
            "units first, shrink, then prune the weights of the result."
        )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    unused = (*WHILE_TRAINING, "min_units", "max_layer_sparsity") if single else WHILE_TRAINING
    useless = next((name for name in unused if getattr(config, name) != defaults[name]), None)
    if useless is not None:
        what = "on single weights" if useless not in WHILE_TRAINING else "without training"
        raise ConfigError(
            f"PruningConfig.{useless}: got {getattr(config, useless)!r}, which has no effect {what}; allowed: the "
            f"default {defaults[useless]!r}."
        )
    if single:
        _check_weights(config, compares=method.compares)
    if config.target() is not None and config.method_options().decides:
        raise ConfigError("PruningConfig.options: flops says how much goes, and so does the budget; allowed: one.")
    if not isinstance(config.structures, Mapping) and config.allocation != "global":
        raise ConfigError(
            f"PruningConfig.allocation: {config.allocation!r}, but with flops all units compete; allowed: 'global'."
        )


def _check_weights(config: PruningConfig, *, compares: bool) -> None:
    if config.pattern() is None and config.granularity != "element":
        raise ConfigError(
            f"PruningConfig.granularity: got {config.granularity!r}; allowed without training: 'element', or N:M such "
            "as '2:4'."
        )
    if config.pattern() is None and not compares and config.allocation != "per_layer":
        raise ConfigError(
            f"PruningConfig.allocation: {config.allocation!r}, but {config.criterion!r} does not compare weights of "
            "different layers; allowed: 'per_layer'."
        )
