"""``prune_oneshot``: from a trained model and a few batches to masks, without training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import PruningConfig
from hf_compress.errors import TargetError
from hf_compress.graph.accept import check_model, remedy_for
from hf_compress.graph.capture import evaluating
from hf_compress.graph.fake import has_no_weights
from hf_compress.graph.model import ModelGraph
from hf_compress.latency.budget import LatencyBudget, budget_for
from hf_compress.latency.masks import MeasuredSpeedup
from hf_compress.oneshot.calibration import Calibration
from hf_compress.oneshot.linear import all_or_nothing
from hf_compress.oneshot.request import Found, Job, find_targets, jobs_of
from hf_compress.oneshot.settings import CRITERIA, check_config
from hf_compress.shrinking.plan import refuse_compressed
from hf_compress.shrinking.shrink import shrink

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

    measured: MeasuredSpeedup | None = None
    """What was measured of the shrunk model, if a speed-up or a latency was asked for."""

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
    seed: int = 0,
) -> OneShotResult:
    """Choose what a trained model can do without, from a few batches, without training.

    ``obs`` also updates the weights that read the units which go, and ``kwon`` scales those of the units that stay;
    single weights (``structures={"weights": ...}``, by whatever granularity) become zero. Everything else leaves the
    model as it was, and so does every criterion if an error comes up on the way.

    Parts of the model that ``rules`` give a criterion or options of their own are pruned one after the other, in the
    order of the rules, each in the model as those before it left it: with changed weights, but with all its units.

    Nothing keeps the zeros among single weights: training and merged adapters overwrite them without a word. Merge
    adapters first. To train on, use ``PruningCallback`` with the same structures, granularity, allocation, limits,
    rules and exclude, and ``criterion="level", schedule="one_shot", begin=0, end=1``: the zeros, which are the smallest
    weights, are what it removes after the first step. ``TrainingArguments(warmup_steps=1)`` makes the learning rate of
    that step 0; without, zeros may change places with other small weights.

    Args:
        model: The model; wherever it is, in whatever mode.
        dataloader: Gives mappings of forward arguments, padding marked by ``attention_mask``; a few hundred examples
            are enough. ``taylor``, ``fisher`` and ``kwon`` need labels.
        config: Which structures, how much, by which criterion of ``CRITERIA``; nothing that says when.
        num_batches: Take no more batches than these.
        example_inputs: Keyword arguments for one forward pass, to analyze the model, and to time it for a speed-up or a
            latency; made from its config by default.
        seed: Of ``random``.

    Returns:
        Masks for ``shrink``, scores, and what was changed.

    Raises:
        ConfigError: For settings that do not go together or have no effect, and batches that are none.
        TargetError: If the model lacks what is asked for, if weights, scores or what batches give are not finite, or if
            a speed-up or latency is missed by more than 10 %; the message says which.
        GraphError: If the model cannot be analyzed.
    """
    check_config(config, seed)
    graph = prunable_graph("prune_oneshot", model, example_inputs)
    with evaluating(model):
        budget = budget_for(config, model, graph, example_inputs, lambda measure: measure())
    targets = find_targets(model, graph, config, budget)
    measured = None
    with all_or_nothing() as undo, evaluating(model):
        calibration = Calibration(model, dataloader, num_batches)
        parts = [Job(part, pools, model, graph, targets, calibration, undo, seed) for part, pools in jobs_of(targets)]
        found = [_carry_out(part) for part in parts]
        masks = {name: mask for each in found for name, mask in each.masks.items()}
        if isinstance(budget, LatencyBudget):
            measured = budget.measure(
                shrink(model, masks, example_inputs=example_inputs, verify=False, quantizers=False)
            )
            budget.check(measured, "The model is as it was.")
    return OneShotResult(
        masks={name: masks[name] for name in targets.groups},
        weight_masks={name: masks[name] for name in targets.weights},
        scores={name: scores for each in found for name, scores in each.scores.items()},
        changed=undo.names(model),
        measured=measured,
    )


def _carry_out(job: Job) -> Found:
    criterion = CRITERIA[job.config.criterion]
    find = criterion.units if job.groups else criterion.weights
    assert find is not None
    return find(job)


def prunable_graph(caller: str, model: Any, example_inputs: Any) -> ModelGraph:
    """Return what there is to know about a model that can be pruned.

    Args:
        caller: The function that was called, for messages.
        model: What it was given as the model.
        example_inputs: What it was given to run it on.

    Raises:
        TargetError: See ``check_prunable``.
        ShrinkError: See ``check_prunable``.
        GraphError: If the model cannot be analyzed.
    """
    check_prunable(caller, model, example_inputs)
    return ModelGraph(model, example_inputs)


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
