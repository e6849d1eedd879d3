"""Take whole layers out: the rest moves up, and becomes what the architecture itself builds at these places."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.depth import build_empty, differences, find_shallower, misfit, submodule
from hf_compress.graph.integers import Attribute, read
from hf_compress.graph.model import ModelGraph

Kept = Mapping[str, Sequence[int]]
"""Name of a list of layers -> positions that stay, ascending."""


def renamed(name: str, kept: Kept) -> str | None:
    """Return what a module or parameter is called once layers are gone, or None if it went with them."""
    for layers, positions in kept.items():
        if name.startswith(f"{layers}."):
            index, dot, rest = name[len(layers) + 1 :].partition(".")
            if not index.isdigit():
                continue  # the list itself: the group of its layers
            if int(index) not in positions:
                return None
            return f"{layers}.{list(positions).index(int(index))}{dot}{rest}"
    return name


def drop_layers(model: PreTrainedModel, kept: Kept) -> None:
    """Remove layers in place and make the config say so.

    Args:
        model: The model; parameters may be sliced already, the config not.
        kept: What stays.

    Raises:
        ShrinkError: If the architecture builds other modules at these places, so that the result could not be loaded.
    """
    if not kept:
        return
    full = build_empty(type(model), model.config)
    shallower = find_shallower(full, kept) if full is not None else None
    if full is None or shallower is None:
        raise ShrinkError(
            f"layers {dict(kept)}: no fields of {type(model.config).__name__} describe a model with these layers "
            "alone; leave the number of layers as it is."
        )
    for name, positions in kept.items():
        _move_up(model, full, shallower.model, name, positions)
    for name, module in model.named_modules():
        if not any(name.startswith(f"{layers}.") for layers in kept):
            for key, _, new in differences(full.get_submodule(name), shallower.model.get_submodule(name)):
                vars(module)[key] = new
    for path, value in shallower.edits.items():
        owner: Any = model.config
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        if isinstance(path[-1], int):
            owner[path[-1]] = value
        else:
            setattr(owner, path[-1], value)


def inherited_integers(graph: ModelGraph, kept: Kept, new: Mapping[Attribute, int]) -> dict[Attribute, int]:
    """Return new values of integers in layers that come to do what a removed layer did for all (T5's position bias).

    Integers that the layer read for itself are settled: they follow its own sizes.

    Args:
        graph: The model before anything goes.
        kept: What stays.
        new: The integers that follow the sizes of removed and other layers.
    """
    model = graph.model
    full = build_empty(type(model), model.config) if kept and isinstance(model, PreTrainedModel) else None
    heirs: dict[Attribute, int] = {}
    for attribute in graph.equations.attributes() if full is not None else ():
        if renamed(attribute.module, kept) is not None:
            continue
        name = next(name for name in kept if attribute.module.startswith(f"{name}."))
        index, _, inner = attribute.module[len(name) + 1 :].partition(".")
        value = new.get(attribute, read(model, attribute))
        for place in [i for i in kept[name] if i > int(index)][:1]:
            heir = Attribute(f"{name}.{place}.{inner}", attribute.path)
            settled = heir in new or graph.equations.using(heir)
            # One that is not what the architecture makes it has followed the layer's own sizes in an earlier shrink.
            made = _value(full, heir)
            alike = made is not None and made == _value(full, attribute) == _value(model, heir)
            if alike and not settled and made != value:
                heirs[heir] = value
    return heirs


def _value(model: nn.Module | None, attribute: Attribute) -> int | None:
    try:
        return None if model is None else read(model, attribute)
    except (AttributeError, IndexError, TypeError):
        return None


def _move_up(model: nn.Module, full: nn.Module, shallow: nn.Module, name: str, positions: Sequence[int]) -> None:
    layers: Any = model.get_submodule(name)
    old = list(layers.children())
    removed = [layer for i, layer in enumerate(old) if i not in positions]
    for place, index in enumerate(positions):
        before, after = full.get_submodule(f"{name}.{index}"), shallow.get_submodule(f"{name}.{place}")
        problem = misfit(before, after, index, place)
        if problem is not None:
            raise ShrinkError(f"layers of {name!r}: {problem}. Keep the layers before it, or exclude the layers.")
        _complete(old[index], before, after, removed, f"{name}.{index}", place)
        for inner, module in old[index].named_modules():
            for key, _, new in differences(submodule(before, inner), submodule(after, inner)):
                vars(module)[key] = new
    layers._modules.clear()
    for place, index in enumerate(positions):
        layers.add_module(str(place), old[index])


def _complete(
    layer: nn.Module, built: nn.Module, wanted: nn.Module, removed: list[nn.Module], name: str, place: int
) -> None:
    """Give a layer the modules that one at its new place has, from layers that go.

    Only those that the architecture does not build at the old place: a block without units lacks others.
    """
    for inner, _ in wanted.named_modules():
        if submodule(built, inner) is None:
            source = next((m for m in (submodule(other, inner) for other in removed) if m is not None), None)
            parent, _, attribute = inner.rpartition(".")
            if source is None:
                raise ShrinkError(f"layers: at place {place}, {name!r} would need a module {inner!r} that it lacks.")
            layer.get_submodule(parent).add_module(attribute, source)
