"""The loss of logits of a batch, of all positions that count."""

import torch
from torch import Tensor

from hf_compress.distillation.losses import loss_of_logits
from hf_compress.distillation.positions import check_same_shape
from hf_compress.distillation.sparse import sparse_kl
from hf_compress.distillation.tokens import common_tokens, over_tokens_of
from hf_compress.errors import ConfigError
from hf_compress.teachers.outputs import SparseLogits


def sum_of_losses(
    name: str, own: Tensor, theirs: Tensor | SparseLogits, counted: Tensor, temperature: float, *, padded: bool = False
) -> Tensor:
    """Return the sum of a loss over the positions that count.

    Args:
        name: Of the loss.
        own: Logits of the student, [batch, classes] or [batch, length, classes].
        theirs: Of the teacher, for the same positions.
        counted: Which positions count, bool, the shape of the logits without the last dimension.
        temperature: T > 0.
        padded: Whether the classes are tokens, of which either may have more than the other.

    Raises:
        ConfigError: If the loss needs more than the largest logits, and there is no more.
        TrainingError: If shapes do not fit each other.
    """
    if isinstance(theirs, SparseLogits):
        return _of_largest(name, own, theirs, counted, temperature, padded)
    if padded:
        own, theirs = common_tokens(own, theirs)
    check_same_shape(own, theirs)
    theirs = theirs.to(own.device)
    if own.dim() == 2:
        return torch.where(counted, loss_of_logits(name, own, theirs, temperature), 0.0).sum()
    chosen = _chosen(counted)
    return loss_of_logits(name, own.flatten(0, -2)[chosen], theirs.flatten(0, -2)[chosen], temperature).sum()


def _of_largest(
    name: str, own: Tensor, theirs: SparseLogits, counted: Tensor, temperature: float, padded: bool
) -> Tensor:
    if name != "kl":
        raise ConfigError(
            f"DistillationConfig.loss: this task compares logits by {name!r}, but the cache holds only the "
            "largest logits (top_k), which allow 'kl' between distributions over classes. Make the cache "
            "without top_k."
        )
    chosen = _chosen(counted)
    picked, indices, values = (each.flatten(0, -2)[chosen] for each in (own, theirs.indices, theirs.values))
    log_rest = theirs.log_rest.flatten()[chosen]
    if padded:
        picked, values, log_rest = over_tokens_of(picked, indices, values, log_rest, theirs.num_classes)
    return sparse_kl(picked, indices, values, log_rest, temperature).sum()


def _chosen(counted: Tensor) -> Tensor:
    """Return numbers: indexing with bool tensors would wait for the device twice to learn how many there are."""
    return counted.flatten().nonzero().squeeze(1)
