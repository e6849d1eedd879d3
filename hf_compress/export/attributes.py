"""Integers of modules that a stored model needs changed, beside the shapes of its parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ExportError, shown
from hf_compress.export.names import candidates, resolve
from hf_compress.graph.blocks import empty_block
from hf_compress.graph.integers import Attribute, write
from hf_compress.graph.multihead import loosen

WHERE = "config.json, quantization_config.attributes"

MAX_VALUE = (1 << 31) - 1
"""Of an attribute."""

Stored = list[tuple[str, tuple[str | int, ...], int]]
"""Module name, path of attribute names and positions from the module on, new value."""


def checked_attributes(data: Any) -> Stored:
    """Return the stored form as tuples.

    Raises:
        ExportError: If it is damaged, or names anything but public integer attributes.
    """
    result: Stored = []
    for entry in _listed(data):
        valid = isinstance(entry, list | tuple) and len(entry) == 3 and isinstance(entry[0], str)
        if not valid or not _is_small(entry[2]) or not _is_path(entry[1]):
            raise ExportError(
                f"{WHERE}: expected [module, [attribute, ...], int], got {str(entry)[:80]}. The file is damaged or was "
                "edited."
            )
        result.append((entry[0], tuple(entry[1]), entry[2]))
    return result


def checked_emptied(data: Any) -> dict[str, tuple[str | None, int | None]]:
    """Return which modules are without heads, and how they return that.

    Raises:
        ExportError: If the stored form is damaged.
    """
    result: dict[str, tuple[str | None, int | None]] = {}
    if not isinstance(data, Mapping | None):
        raise ExportError(
            f"config.json, quantization_config.emptied: expected a mapping of modules, got {str(data)[:80]}. The file "
            "is damaged or was edited."
        )
    for name, how in (data or {}).items():
        output, length = how if isinstance(how, list | tuple) and len(how) == 2 else (0, 0)
        if not isinstance(output, str | None) or not (length is None or (type(length) is int and length > 0)):
            raise ExportError(
                f"config.json, quantization_config.emptied: {name!r} needs [output projection or null, number of "
                f"results or null], got {str(how)[:80]}. The file is damaged or was edited."
            )
        result[str(name)] = (output, length)
    return result


def change_modules(model: Any, emptied: Mapping[str, tuple[str | None, int | None]], flexible: Sequence[str]) -> None:
    """Empty the attention modules that are without heads, and loosen those of other sizes than PyTorch allows.

    Args:
        model: A model as the architecture builds it, with or without its head; names may be those of the other.
        emptied: See ``checked_emptied``.
        flexible: Names of ``nn.MultiheadAttention`` modules.
    """
    modules = dict(model.named_modules())
    for name, how in emptied.items():
        for found in resolve([name], modules, model.base_model_prefix):
            inside = (f"{found}.{how[0]}" if how[0] is not None else found) in modules
            if isinstance(modules[found], PreTrainedModel) or not inside:
                raise ExportError(
                    f"config.json, quantization_config.emptied: {shown(name)} is no part of a {type(model).__name__} "
                    f"that computes attention, with {shown(how[0])} in it. The file is damaged or was edited."
                )
            empty_block(modules[found], *how)
    for name in resolve(flexible, modules, model.base_model_prefix):
        loosen(model.get_submodule(name))


def _listed(data: Any) -> Sequence[Any]:
    if not isinstance(data, list | tuple | None):
        raise ExportError(f"{WHERE}: expected a list, got {str(data)[:80]}. The file is damaged or was edited.")
    return data or ()


def _is_small(value: Any) -> bool:
    """Return whether a value is an int that a size or a place can have."""
    return type(value) is int and abs(value) <= MAX_VALUE


def _is_path(path: Any) -> bool:
    if not isinstance(path, list | tuple) or not path or not isinstance(path[0], str):
        return False
    return all(type(part) is int or (isinstance(part, str) and not part.startswith("_")) for part in path)


def set_attributes(model: Any, attributes: Stored) -> Stored:
    """Give the attributes their stored values.

    Returns:
        The attributes under the model's own names, without those of modules that a model of another class lacks.

    Args:
        model: A model with or without its head; names may be those of the other.
        attributes: See ``checked_attributes``.

    Raises:
        ExportError: If the model has no such integer.
    """
    modules = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    found: Stored = []
    for stored, path, value in attributes:
        names = candidates(stored, prefix)
        name = next((n for n in names if n in modules and _is_integer(model, Attribute(n, path))), None)
        if name is None and not same_class and modules.isdisjoint(names):
            continue
        if name is None:
            raise ExportError(
                f"{WHERE}: the {type(model).__name__} has no integer {shown('.'.join([stored, *map(str, path)]))}. The "
                "checkpoint is of another architecture, or of a version of transformers that names things differently."
            )
        write(model, Attribute(name, path), value)
        found.append((name, path, value))
    return found


def _is_integer(model: nn.Module, attribute: Attribute) -> bool:
    """Return whether an attribute is an int now, of the module itself or of data that it has, such as its config."""
    value: Any = model.get_submodule(attribute.module)
    try:
        for part in attribute.path:
            value = value[part] if isinstance(part, int) else getattr(value, part)
            if isinstance(value, nn.Module | Tensor):
                return False
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return isinstance(value, int) and not isinstance(value, bool)
