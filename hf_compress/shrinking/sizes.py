"""Sizes that modules remember beside their parameters, and the stock config that says the same."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from hf_compress.graph.depth import build_empty, submodule
from hf_compress.graph.integers import Attribute, read

METHOD = "hf_compress"
"""``quant_method`` of a config that describes uneven sizes."""

MAX_CONFIG_TRIALS = 64

Agrees = Callable[[PretrainedConfig], bool]
"""Whether a model, loaded with a config, computes what it computes now."""


def stored_sizes(model: nn.Module) -> Mapping[str, Any]:
    """Return the stored form of uneven sizes from a model's config; empty if it has none."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is None:
        return {}
    found: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    return found if found.get("quant_method") == METHOD else {}


def refresh_sizes(model: nn.Module) -> None:
    """Set the size attributes of standard layers from the shapes of their parameters."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.Conv1d | nn.Conv2d) and not module.transposed:
            module.out_channels, inner = module.weight.shape[:2]
            module.in_channels = inner * module.groups


def tensor_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every parameter and buffer by name, tied parameters under each of their names."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    shapes.update((name, buffer.shape) for name, buffer in model.named_buffers())
    return shapes


def find_stock_config(
    model: PreTrainedModel, attributes: Sequence[Attribute], changes: Mapping[int, set[int]], agrees: Agrees
) -> dict[str, int] | None:
    """Look for config values with which the architecture itself builds a model of these sizes.

    No table of architectures: integer config fields that hold an old size are set to the new one and the model is
    built on the meta device; only an exact match of every shape, every attribute and every derived number counts.

    Args:
        model: The shrunk model; its config still describes the old widths.
        attributes: Integers of the forward code that the config must give as they are in the model.
        changes: Old number of units -> the new numbers it became; more than one means uneven layers.
        agrees: Whether the model, loaded with a config, computes what it computes now.

    Returns:
        Config fields to set, or None if no stock config gives these shapes.
    """
    if any(len(new) > 1 for new in changes.values()):
        return None
    shapes = tensor_shapes(model)
    fields = [(name, old, next(iter(changes[old]))) for name, old in _integer_fields(model.config) if old in changes]
    for chosen in itertools.islice(_subsets(fields), MAX_CONFIG_TRIALS):
        config = copy.deepcopy(model.config)
        for name, _, new in chosen:
            setattr(config, name, new)
        built = build_empty(type(model), config)
        if (
            built is not None
            and _same_shapes(tensor_shapes(built), shapes, non_persistent_buffers(model))
            and same_floats(built, model)
            and all(_read_or_none(built, attribute) == read(model, attribute) for attribute in attributes)
            and _can_be_stored(config)
            and _makes_the_same_buffers(config, model)
            and agrees(config)
        ):
            return {name: new for name, _, new in chosen}
    return None


def _same_shapes(built: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], anew: set[str]) -> bool:
    """Compare shapes; buffers that are made anew may be fewer, since they may have been for layers that are gone."""
    return (built.keys() ^ ours.keys()) <= anew and all(
        ours[name] == built[name] for name in built.keys() & ours.keys()
    )


def same_floats(built: nn.Module, model: nn.Module) -> bool:
    """Whether the architecture derives the same numbers from the sizes: scales of attention and of embeddings."""
    for name, module in built.named_modules():
        found = submodule(model, name)
        other = vars(found) if found is not None else {}
        for key, value in vars(module).items():
            if type(value) is float and not key.startswith("_") and other.get(key) != value:
                return False
    return True


def _can_be_stored(config: PretrainedConfig) -> bool:
    """Whether a config passes its own checks when it is loaded."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # noqa: BLE001 - whatever the config's class raises
        return False
    return True


def _makes_the_same_buffers(config: PretrainedConfig, model: PreTrainedModel) -> bool:
    """Whether buffers that are not stored come out as they are in the model: some hold numbers made from sizes."""
    anew = non_persistent_buffers(model)
    if not anew:
        return True
    with init_empty_weights(include_buffers=False), no_init_weights():
        built = dict(type(model)(copy.deepcopy(config)).named_buffers())
    ours = dict(model.named_buffers())
    # Compared in the model's own precision: a model that was cast as a whole has cast these too.
    return all(torch.equal(built[name].to(ours[name]), ours[name]) for name in anew & built.keys())


def non_persistent_buffers(model: nn.Module) -> set[str]:
    """Return the names of buffers that are made anew when a model is built, and are not stored."""
    names = set()
    for prefix, module in model.named_modules():
        names |= {f"{prefix}.{name}" if prefix else name for name in module._non_persistent_buffers_set}
    return names


def left_out_when_saved(model: PreTrainedModel) -> set[str]:
    """Return the names of tensors that are not stored, since the architecture makes them anew: sinusoidal positions."""
    return set(model._keys_to_ignore_on_save or ())


def store_too(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Have tensors of other shapes than the architecture makes stored all the same."""
    model._keys_to_ignore_on_save = left_out_when_saved(model) - set(names)


def _integer_fields(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if type(value) is int and not name.startswith("_") and not name.endswith("_id"):
            yield name, value


def _subsets(fields: list[tuple[str, int, int]]) -> Iterator[tuple[tuple[str, int, int], ...]]:
    for size in range(len(fields) + 1):
        yield from itertools.combinations(fields, size)


def _read_or_none(model: nn.Module, attribute: Attribute) -> int | None:
    try:
        return read(model, attribute)
    except (AttributeError, IndexError):
        return None
