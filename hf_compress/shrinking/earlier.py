"""What a model's config says of earlier shrinks, and how it goes on after another one."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.graph.depth import submodule
from hf_compress.graph.integers import Attribute
from hf_compress.shrinking.depth import Kept, renamed
from hf_compress.shrinking.plan import Positions, ShrinkPlan
from hf_compress.shrinking.sizes import stored_sizes

Units = dict[str, dict[str, int]]
"""Group name -> ``{"kept": units left, "of": units that the config's own fields give}``."""


def take_sizes(model: PreTrainedModel) -> Mapping[str, Any]:
    """Take the stored form of uneven sizes out of a model's config; empty if there is none.

    What is left of the config describes the model as the architecture builds it.
    """
    stored = stored_sizes(model)
    if stored:
        del model.config.quantization_config
    return stored


def all_units(stored: Mapping[str, Any], plan: ShrinkPlan) -> Units:
    """Return what all shrinks left of each group, under the names that the groups have now."""
    before: Mapping[str, Mapping[str, int]] = stored.get("units", {})
    found: Units = {name: dict(entry) for name, entry in before.items()}
    for name, group in plan.groups.items():
        earlier = before.get(name)
        # Of several groups in a module, one may have come to be called what another was.
        same = earlier is not None and earlier["kept"] == group.num_units
        first = earlier["of"] if earlier is not None and same else group.num_units
        found[name] = {"kept": len(group.kept), "of": first}
    now = ((renamed(name, plan.layers), entry) for name, entry in found.items())
    return {name: entry for name, entry in now if name is not None}


def size_changes(model: nn.Module, units: Units) -> dict[int, set[int]]:
    """Return what sizes that the config gives became: old number of units -> the new numbers."""
    changes: dict[int, set[int]] = {}
    for name, entry in units.items():
        if not _counts_layers(model, name):
            changes.setdefault(entry["of"], set()).add(entry["kept"])
    return changes


def _counts_layers(model: nn.Module, name: str) -> bool:
    lists = (submodule(model, each) for each in (name, name.removesuffix(".layers")))
    return any(isinstance(each, nn.ModuleList) for each in lists)


def all_buffers(stored: Mapping[str, Any], keep: Positions, layers: Kept) -> Positions:
    """Return which positions all shrinks left of parameters and buffers that were cut, as the architecture counts.

    Args:
        stored: See ``take_sizes``.
        keep: What the last shrink left, counted as it found them.
        layers: Layers that stayed then.
    """
    found: Positions = {
        name: {int(dim): list(where) for dim, where in dims.items()} for name, dims in stored.get("buffers", {}).items()
    }
    for name, dims in keep.items():
        before = found.setdefault(name, {})
        for dim, where in dims.items():
            before[dim] = [before[dim][i] for i in where] if dim in before else list(where)
    now = ((renamed(name, layers), dims) for name, dims in found.items())
    return {name: dims for name, dims in now if name is not None}


def earlier_attributes(stored: Mapping[str, Any]) -> list[Attribute]:
    """Return the integers that earlier shrinks changed, under the names that they had before the last one."""
    return [Attribute(module, tuple(path)) for module, path, _ in stored.get("attributes", [])]
