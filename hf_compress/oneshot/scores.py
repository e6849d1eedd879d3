"""Criteria that score units and let the allocation choose: the weights of the model stay as they are."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.instruments.gate import check_gateable, gated
from hf_compress.oneshot.calibration import check_finite, without_gradients_of
from hf_compress.oneshot.linear import unit_readers
from hf_compress.oneshot.request import Found, Job

LABELS = (
    "Check the labels; a loss that compares examples with each other (CLIP's) is constant for the single ones that "
    "fisher and kwon look at."
)
"""What to do about gradients that are all 0."""


def by_weights(job: Job) -> Found:
    """Score units as while training, by their own weights or by chance. No batch is run."""
    return _allocated(job, own_scores(job))


def own_scores(job: Job) -> dict[str, Tensor]:
    """Return the scores of a method that reads weights alone, or nothing, by layer: [num_units]."""
    method = job.method()
    found = {}
    for name, evidence in job.evidence().items():
        method.start(name, evidence)
        found[name] = method.score(name, evidence)
    return found


def wanda(job: Job) -> Found:
    """Score units by ``sum of |W_ij| * ||x_j||_2`` over the weights that read them.

    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1, summed over a unit's columns.
    """
    readers = {name: unit_readers(job.model, group) for name, group in job.groups.items()}
    layers = {each.layer.name: each.layer for found in readers.values() for each in found}
    job.calibration.stages(layers)
    squares = job.calibration.squares(layers, "Measuring inputs")
    method, scores = job.method(), {}
    for name, evidence in job.evidence().items():
        method.tensors[name] = torch.cat([squares[each.layer.name] for each in readers[name]])
        scores[name] = method.score(name, evidence)
    check_informative(scores, "inputs are", "Check the batches, and whether the model passes anything on.")
    return _allocated(job, scores)


def gate_gradients(job: Job) -> Found:
    """Score units by the gradients of gates at 1: ``taylor``, ``taylor2`` or ``fisher``.

    ``taylor``, ``taylor2``: mean over batches of ``|d loss / d gate|``, or of its square (Molchanov et al. 2019,
    arXiv:1906.10771, eq. 8).
    ``fisher``: mean over examples of its square, the diagonal of the empirical Fisher information.
    """
    of_examples = job.config.criterion == "fisher"
    gradients = collect_gradients(job, per_example=of_examples)
    score = torch.abs if job.config.criterion == "taylor" else torch.square
    scores = {name: score(values).mean(0) for name, values in gradients.items()}
    check_informative(scores, "gradients are", LABELS)
    return _allocated(job, scores)


def check_informative(scores: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Check that scores say anything.

    Args:
        scores: By layer.
        what: What they were made of, with its verb.
        remedy: What to do if they do not.

    Raises:
        TargetError: If all are 0.
    """
    if not any(bool(values.any()) for values in scores.values()):
        raise TargetError(f"prune_oneshot: all {what} 0, so nothing says which units matter. {remedy}")


def collect_gradients(job: Job, *, per_example: bool) -> dict[str, Tensor]:
    """Return d loss / d gate of all gates at 1, of every batch or every example.

    Returns:
        By group name, [batches or examples, num_units] in float64 on the CPU.

    Raises:
        TargetError: If a group cannot be gated or gets no gradient.
    """
    groups = job.groups
    check_gateable(job.model, list(groups.values()))
    parts: dict[str, list[Tensor]] = {name: [] for name in groups}
    with (
        gated(job.model, groups, needs_gradient=True) as gates,
        without_gradients_of(list(job.model.parameters())),
    ):
        for number, loss in job.calibration.losses("Measuring gradients", per_example=per_example):
            found = _gradients(loss, [gate.value for gate in gates.values()])
            for name, gradient in zip(gates, found, strict=True):
                if gradient is None:
                    raise TargetError(
                        f"prune_oneshot: the loss of batch {number} does not depend on {name!r}. Exclude it, or "
                        "give batches that reach it."
                    )
                check_finite(number, f"gradients of {name}", gradient)
                parts[name].append(gradient.double().cpu())
    return {name: torch.stack(rows) for name, rows in parts.items()}


def _gradients(loss: Tensor, values: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not loss.requires_grad:  # autograd would raise instead of saying that nothing was used
        return [None] * len(values)
    return torch.autograd.grad(loss, values, allow_unused=True)


def block_influence(job: Job) -> Found:
    """Score layers by how much they turn the hidden states: ``1 - mean cosine(x_in, x_out)`` over tokens.

    Source: ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1.
    """
    modules = {name: job.model.get_submodule(name) for group in job.groups.values() for name in group.modules}
    sums = dict.fromkeys(modules, 0.0)
    tokens = dict.fromkeys(modules, 0)

    def read(number: int, name: str, before: Tensor, after: Tensor) -> None:
        cosines = F.cosine_similarity(before.double(), after.double(), dim=-1)
        check_finite(number, name, cosines)
        sums[name] += float(cosines.sum())
        tokens[name] += cosines.numel()

    job.calibration.changes(modules, read)
    unseen = next((name for name, count in tokens.items() if count == 0), None)
    if unseen is not None:
        raise TargetError(f"prune_oneshot: {unseen!r} sees no token of these batches. Exclude it, or give others.")
    influence = {name: 1 - sums[name] / tokens[name] for name in modules}
    scores = {n: torch.tensor([influence[name] for name in g.modules]) for n, g in job.groups.items()}
    return _allocated(job, scores)


def _allocated(job: Job, scores: dict[str, Tensor]) -> Found:
    scores = {name: values.detach().double().cpu() for name, values in scores.items()}
    return Found(job.allocate(scores), scores)
