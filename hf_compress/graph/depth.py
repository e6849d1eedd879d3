"""How an architecture itself describes a shallower model: which config fields say how many layers there are.

No table of architectures: fields that hold the old number of layers are tried, and the model is built on the meta
device; what counts is that exactly the modules of the dropped layers are missing.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

MAX_TRIALS = 48

COINCIDENCE = 4
"""A list of up to this many entries may have as many as there are layers by chance; then its name has to say so."""

Path = tuple[str | int, ...]
"""Attribute names and list positions from the config on."""

Edits = dict[Path, Any]
"""New values of config fields."""


@dataclass(frozen=True, eq=False)
class Shallower:
    """How the architecture describes a model with fewer layers."""

    edits: Edits
    """Config fields to set."""

    model: PreTrainedModel
    """What the architecture builds then, on the meta device."""


def find_shallower(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> Shallower | None:
    """Return config fields with which the architecture builds the model with fewer layers.

    Args:
        model: The full model, of the widths that its config says.
        kept: Positions that stay, by name of the ``ModuleList`` that holds the layers.

    Returns:
        The fields and the model, or None if no choice of fields gives such a model.
    """
    edits: Edits = {}
    reference = model
    for name, positions in kept.items():
        found = _find_for_list(model, reference, name, positions, edits)
        if found is None:
            return None
        edits, reference = found.edits, found.model
    return Shallower(edits, reference)


def edited(config: PretrainedConfig, edits: Edits) -> PretrainedConfig:
    """Return a copy of the config with the fields set."""
    result = copy.deepcopy(config)
    for path, value in edits.items():
        owner: Any = result
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        last = path[-1]
        if isinstance(last, int):
            owner[last] = value
        else:
            setattr(owner, last, value)
    return result


def build_empty(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel | None:
    """Return the model on the meta device, or None if the architecture refuses the config."""
    try:
        with torch.device("meta"), no_init_weights():
            return model_class(copy.deepcopy(config))
    except Exception:  # noqa: BLE001 - a config that the architecture refuses, in whatever way, is no candidate
        return None


def _find_for_list(
    model: PreTrainedModel, reference: PreTrainedModel, name: str, kept: Sequence[int], before: Edits
) -> Shallower | None:
    layers: Any = model.get_submodule(name)
    wanted = (len(kept), _shapes_outside(reference, name))
    choices = itertools.product(_choices(model.config, name, len(layers)), (True, False))
    for fields, derive in itertools.islice(choices, MAX_TRIALS):
        edits = {**before, **_edits_for(model.config, fields, len(layers), kept, derive=derive)}
        try:
            config = edited(model.config, edits)
            type(config).from_dict(config.to_dict())  # it will be stored
        except Exception:  # noqa: BLE001 - whatever a config refuses, in whatever way, is no candidate
            continue
        built = build_empty(type(model), config)
        if built is not None and _layers_of(built, name) == wanted:
            return Shallower(edits, built)
    return None


def _edits_for(
    config: PretrainedConfig, fields: Sequence[Path], count: int, kept: Sequence[int], *, derive: bool
) -> Edits:
    """Return the fields with their new number, and what the config says layer by layer or derives from the number."""
    edits: Edits = {path: len(kept) for path in fields}
    for path in fields:
        owner: Any = config
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        if not isinstance(owner, PretrainedConfig):
            continue
        derived = _derived(owner, str(path[-1]), count, len(kept)) if derive else {}
        edits |= {(*path[:-1], key): value for key, value in derived.items()}
        for key, value in vars(owner).items():
            by_layer = isinstance(value, list | tuple) and len(value) == count and not key.startswith("_")
            if by_layer and (count > COINCIDENCE or "layer" in key or "block" in key):
                edits[(*path[:-1], key)] = type(value)(value[i] for i in kept)
    return edits


def _derived(config: PretrainedConfig, field: str, count: int, new: int) -> dict[str, Any]:
    """Return what follows from a field by the defaults of the config's class (names of stages, a second counter)."""
    try:
        make: Any = type(config)
        before, after = vars(make(**{field: count})), vars(make(**{field: new}))
    except Exception:  # noqa: BLE001 - a class that cannot be made from one field derives nothing that could be seen
        return {}
    changed = (key for key in before.keys() & after.keys() if before[key] != after[key] and key != field)
    return {key: after[key] for key in changed if vars(config).get(key) == before[key]}


def _shapes_outside(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Return the modules and the shapes of the parameters that are not in the list of layers."""
    found: dict[str, Any] = {other: None for other, _ in model.named_modules()}
    # Under each of their names: an empty model is not tied.
    found |= {other: parameter.shape for other, parameter in model.named_parameters(remove_duplicate=False)}
    return {other: shape for other, shape in found.items() if not other.startswith(f"{name}.")}


def _layers_of(built: PreTrainedModel, name: str) -> tuple[int, dict[str, Any]] | None:
    try:
        layers: Any = built.get_submodule(name)
    except AttributeError:
        return None
    return len(layers), _shapes_outside(built, name)


def _choices(config: PretrainedConfig, name: str, count: int) -> Iterator[tuple[Path, ...]]:
    """Yield sets of fields to try: single ones first, those that sound like it before others."""
    fields = sorted(integer_fields(config, count), key=lambda path: _rank(path, name))
    for size in (1, 2, 3):
        yield from itertools.combinations(fields, size)


def _rank(path: Path, name: str) -> tuple[bool, bool, int]:
    words = {word for word in ("encoder", "decoder", "text", "vision", "audio") if word in name}
    label = ".".join(map(str, path))
    return not any(word in label for word in words), not ("layer" in label or "depth" in label), len(path)


def integer_fields(config: Any, count: int, prefix: Path = ()) -> Iterator[Path]:
    """Yield the paths of config fields, those of nested configs and of lists too, that hold the number ``count``."""
    for key, value in vars(config).items():
        if key.startswith("_") or key.endswith("_id"):
            continue
        if isinstance(value, PretrainedConfig):
            yield from integer_fields(value, count, (*prefix, key))
        elif type(value) is int and value == count:
            yield (*prefix, key)
        elif isinstance(value, list) and all(type(item) is int for item in value):
            yield from ((*prefix, key, i) for i, item in enumerate(value) if item == count)


def misfit(before: nn.Module, after: nn.Module, index: int, place: int) -> str | None:
    """Return why a layer cannot become what the architecture builds at another place, or None.

    Args:
        before: The layer as the architecture builds it where it was.
        after: What the architecture builds at its new place.
        index: Where it was.
        place: Its new place.
    """
    names = {name for name, _ in after.named_parameters(remove_duplicate=False)}
    extra = next((name for name, _ in before.named_parameters(remove_duplicate=False) if name not in names), None)
    if extra is not None:
        return f"layer {index} has {extra!r}, which a layer at place {place} has not"
    present = {name for name, _ in before.named_modules()}
    receiving = {name.rpartition(".")[0] for name, _ in after.named_modules() if name not in present}
    for name, module in before.named_modules():
        for key, was, new in differences(module, submodule(after, name)):
            # Floats may differ by depth without harm (rates of stochastic depth); the numbers are compared anyway.
            matters = type(new) is not float and name not in receiving
            if matters and (was, new) != (index, place):
                return f"layer {index} has {key}={was} in {name!r}, a layer at place {place} has {new}"
    return None


def differences(before: nn.Module | None, after: nn.Module | None) -> Iterator[tuple[str, Any, Any]]:
    """Yield the plain attributes that differ: name, value before, value after."""
    known = vars(before) if before is not None else {}
    for key, new in vars(after).items() if after is not None else ():
        if not key.startswith("_") and key != "training" and isinstance(new, bool | int | float | str):
            was = known.get(key)
            if type(was) is not type(new) or was != new:
                yield key, was, new


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """Return a submodule, or None if there is none of that name."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
