"""Models with masks, made from the instruments that pruning trains with, and without anything that ``shrink`` does."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.graph.capture import main_outputs
from hf_compress.graph.groups import DimensionGroup, within
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.instruments.gate import Gate
from hf_compress.instruments.layer import LayerGates
from hf_compress.shrinking.depth import renamed

Masks = dict[str, Tensor]


def prunable(groups: Iterable[DimensionGroup], *kinds: str) -> list[DimensionGroup]:
    """Return the groups that may lose units, of some kinds or of all."""
    return [g for g in groups if g.frozen is None and (not kinds or g.kind in kinds)]


def random_masks(groups: Iterable[DimensionGroup], seed: int, *, lose: bool = False) -> Masks:
    """Return random masks that ask for nothing but what the groups say is possible.

    Groups that are tied keep the same share of their units; every other group has a share of its own, from a single
    unit (or the fewest that are allowed) to all of them. With ``lose``, every group that can loses at least one.
    """
    by_name = {group.name: group for group in groups}
    generator = torch.Generator().manual_seed(seed)
    masks: Masks = {}
    for group in by_name.values():
        if group.name in masks:
            continue
        together = [group, *(by_name[name] for name in group.tied_to if name in by_name)]
        parts = math.gcd(*(g.num_units // g.multiple_of for g in together))
        possible = [k for k in range(1, parts + 1) if all(_allowed(g, g.num_units * k // parts) for g in together)]
        if lose and len(possible) > 1 and possible[-1] == parts:
            possible.pop()
        share = possible[int(torch.randint(len(possible), (1,), generator=generator))]
        for member in together:
            masks[member.name] = _random_mask(member, member.num_units * share // parts, generator)
    return masks


def _allowed(group: DimensionGroup, kept: int) -> bool:
    return kept >= max(group.min_units, len(group.fixed_units)) and kept % group.multiple_of == 0


def _random_mask(group: DimensionGroup, kept: int, generator: torch.Generator) -> Tensor:
    rank = torch.rand(group.num_units, generator=generator)
    rank[list(group.fixed_units)] = 2.0
    mask = torch.zeros(group.num_units, dtype=torch.bool)
    mask[rank.argsort(descending=True)[:kept]] = True
    return mask


def remaining_parameters(model: PreTrainedModel, groups: Iterable[DimensionGroup], masks: Mapping[str, Tensor]) -> int:
    """Return how many weights belong to no masked unit, by marking the masked positions of every parameter."""
    left = {name: torch.ones(parameter.shape, dtype=torch.bool) for name, parameter in model.named_parameters()}
    kept = kept_layers(groups, masks)
    moving: set[str] = set()
    for group in groups:
        moving |= set(group.handed_on)
        gone = ~masks.get(group.name, torch.ones(group.num_units, dtype=torch.bool))
        for part in group.slices:
            left[part.parameter].index_fill_(part.dim, part.index[gone].flatten(), False)
    return sum(
        int(part.sum()) for name, part in left.items() if within(name, moving) or renamed(name, kept) is not None
    )


def kept_layers(groups: Iterable[DimensionGroup], masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the layers that stay, by name of the module list, for lists that lose some."""
    found = {}
    for group in groups:
        if group.modules and group.name in masks and not masks[group.name].all():
            found[group.modules[0].rpartition(".")[0]] = masks[group.name].nonzero().flatten().tolist()
    return found


@contextmanager
def gated(model: PreTrainedModel, groups: Iterable[DimensionGroup], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model compute without the masked units while the context is open; its weights stay as they are."""
    gates: list[Any] = []
    try:
        for group in groups:
            mask = masks.get(group.name)
            if mask is None:
                continue
            if group.modules:
                gates.append(LayerGates(group, model, mask.float()))
            else:
                gates.append(Gate(group, model, needs_gradient=False))
                gates[-1].set_mask(mask)
        yield
    finally:
        for gate in gates:
            gate.remove()


def other_inputs(entry: Any, model: PreTrainedModel, seed: int = 1) -> dict[str, Any]:
    """Return inputs of another batch size and length than those that ``shrink`` looks at, where they can differ."""
    explicit = entry.example_inputs(model)
    if explicit is not None:
        return dict(explicit)
    inputs = make_example_inputs(model, batch_size=4, length=7, seed=seed)
    if "input_values" in inputs:
        inputs["input_values"] = torch.cat([inputs["input_values"], inputs["input_values"][:, :900]], dim=1)
    return inputs


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the main floating-point outputs."""
    return [t for t in main_outputs(model.eval()(**inputs)) if t.is_floating_point()]
