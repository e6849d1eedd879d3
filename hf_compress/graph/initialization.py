"""Sizes that an architecture's own weight initialization insists on, when a model is loaded.

Loading runs the initialization before the stored weights replace it, and some of it does not work for every size:
sinusoidal position tables need an even number of channels.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.graph.depth import build_empty
from hf_compress.graph.groups import DimensionGroup

MULTIPLES = (1, 2, 4, 8)


def with_multiples(model: nn.Module, groups: list[DimensionGroup]) -> list[DimensionGroup]:
    """Say of groups that hold tables made by a formula which multiples of units the initialization takes.

    Such tables are parameters that are not trained, so only groups with one are tried.
    """
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    suspects = [g for g in groups if g.frozen is None and any(part.parameter in fixed for part in g.slices)]
    if not suspects or not isinstance(model, PreTrainedModel):
        return groups
    found = {id(group): replace(group, multiple_of=_multiple(model, group)) for group in suspects}
    return [found.get(id(group), group) for group in groups]


def _multiple(model: PreTrainedModel, group: DimensionGroup) -> int:
    for multiple in MULTIPLES:
        if multiple < group.num_units and _initializes(model, group, group.num_units - multiple):
            return max(multiple, group.multiple_of)
    return group.multiple_of


def _initializes(model: PreTrainedModel, group: DimensionGroup, kept: int) -> bool:
    empty = build_empty(type(model), model.config)
    if empty is None:
        return True  # nothing can be said
    for part in group.slices:
        parameter = model.get_parameter(part.parameter)  # an earlier shrink may have cut it
        shape = list(parameter.shape)
        shape[part.dim] -= part.index.shape[1] * (group.num_units - kept)
        owner, _, attribute = part.parameter.rpartition(".")
        smaller = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=parameter.requires_grad)
        setattr(empty.get_submodule(owner), attribute, smaller)
    try:
        with torch.device("meta"):
            empty.initialize_weights()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - whatever the architecture's code raises, loading would fail with it too
        return False
    return True
