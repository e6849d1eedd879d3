"""Models that have lost the same share of units in every layer, for benchmarks of latency."""

import torch
from transformers import PreTrainedModel

from hf_compress import dimension_groups, shrink


def pruned(model: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    """Return the model without a share of the heads and feed-forward units of each layer; one stays at least."""
    masks = {}
    for group in dimension_groups(model):
        if group.kind in ("heads", "ffn"):
            masks[group.name] = torch.arange(group.num_units) < max(round(group.num_units * (1 - sparsity)), 1)
    return shrink(model, masks)
