"""Sizes of what a checkpoint lacks: a new head has to fit the pruned model under it."""

from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.errors import ExportError, GraphError
from hf_compress.export.names import candidates
from hf_compress.graph.depth import build_empty
from hf_compress.graph.groups import DimensionGroup
from hf_compress.graph.model import dimension_groups

Shapes = dict[str, list[int]]


def is_narrow(units: Mapping[str, Any]) -> bool:
    """Return whether the residual stream lost units, so that what reads it must fit, a new head too."""
    return any("hidden" in name.split(".")[-2:] for name in units)  # the last part may be a number


def has_another_head(model: PreTrainedModel, shapes: Mapping[str, Any], stored: Set[str] | None) -> bool:
    """Return whether the model has parameters whose sizes the checkpoint does not tell.

    They are not in the files, or they have the name of something in them that is not the same: classifiers of pooled
    outputs and of tokens.

    Args:
        model: The empty model.
        shapes: Shapes of the pruned parameters, by the model's own names.
        stored: Names of all tensors in the files, or None if unknown.
    """
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    outside = (name for name, parameter in model.named_parameters() if id(parameter) not in inside)
    return any(name not in shapes for name in outside) or _lacks_parameters(model, stored)


def _lacks_parameters(model: PreTrainedModel, stored: Set[str] | None) -> bool:
    names = (name for name, _ in model.named_parameters())
    return stored is None or any(stored.isdisjoint(candidates(name, model.base_model_prefix)) for name in names)


def sizes_of_new_parameters(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> Shapes:
    """Return the shapes that other parameters need to fit those that are known.

    Args:
        model: The model as the architecture builds it, on the meta device.
        shapes: The smaller shapes of the parameters in the checkpoint, under the model's own names.

    Raises:
        ExportError: If the model cannot be analyzed.
    """
    skeleton = build_empty(type(model), model.config) or model  # the model itself is in the middle of being loaded
    _tie(skeleton)
    try:
        with torch.device("cpu"):  # models are built where tensors have no data
            groups = dimension_groups(skeleton)
    except GraphError as error:
        raise ExportError(
            f"{type(model).__name__}: the checkpoint is of {model.config.architectures}, and what its sizes mean "
            f"for the parameters that it lacks cannot be found out: {error} Load it with the class it was saved from."
        ) from error
    parameters = dict(model.named_parameters())
    found: Shapes = {}
    owners = Counter((part.parameter, part.dim) for group in groups for part in group.slices)
    for group in groups:
        kept = _kept(group, owners, shapes)
        for part in group.slices if kept is not None else ():
            if part.parameter not in shapes and kept is not None:
                shape = found.setdefault(part.parameter, list(parameters[part.parameter].shape))
                shape[part.dim] -= (group.num_units - kept) * part.index.shape[1]
    return found


def _tie(model: PreTrainedModel) -> None:
    """Tie weights by hand: transformers does not while it loads a model."""
    for target, source in model.all_tied_weights_keys.items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(source))


def _kept(group: DimensionGroup, owners: Mapping[tuple[str, int], int], shapes: Mapping[str, list[int]]) -> int | None:
    """Return how many units of a group the known parameters have, or None if they do not say or all are left."""
    for part in group.slices:
        # Rows of a query projection are heads times channels: their number alone does not say of which there are fewer.
        if part.parameter in shapes and owners[part.parameter, part.dim] == 1:
            kept = shapes[part.parameter][part.dim] // part.index.shape[1]
            return kept if kept < group.num_units else None
    return None
