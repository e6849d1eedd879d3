"""Checks of what a checkpoint says about itself, before any of it is used."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import ExportError
from hf_compress.reading import is_count

WHERE = "config.json, quantization_config"


def checked_shapes(given: Any) -> dict[str, list[int]]:
    """Return parameter names and their shapes.

    Raises:
        ExportError: If they are no lists of sizes, or there are none.
    """
    valid = isinstance(given, Mapping) and all(
        isinstance(shape, list | tuple) and all(map(is_count, shape)) for shape in given.values()
    )
    if not valid or not given:
        raise _damaged("shapes", "a non-empty mapping of parameter names to lists of sizes", given)
    return {name: list(shape) for name, shape in given.items()}


def checked_units(given: Any) -> dict[str, Any]:
    """Return how many units there are of groups, and were.

    Raises:
        ExportError: If it does not say that.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(map(_is_unit, given.values())):
        raise _damaged("units", 'group name -> {"kept": units left, "of": units before}', given)
    return dict(given)


def _is_unit(entry: Any) -> bool:
    counts = isinstance(entry, Mapping) and set(entry) == {"kept", "of"} and all(map(is_count, entry.values()))
    return counts and entry["kept"] <= entry["of"]


def checked_names(given: Any) -> list[str]:
    """Return the names of modules.

    Raises:
        ExportError: If they are no list of texts.
    """
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise _damaged("flexible", "a list of names of modules", given)
    return list(given)


def checked_inner(given: Any) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of the weights' own format.

    Raises:
        ExportError: If it is none.
    """
    if given is not None and not isinstance(given, Mapping):
        raise _damaged("inner", "null or the quantization_config of the weights' own format", given)
    return None if given is None else dict(given)


def checked_guard(given: Any) -> str | None:
    """Return the name of the parameter that is stored in another shape.

    Raises:
        ExportError: If it is no name.
    """
    if not isinstance(given, str | None):
        raise _damaged("guard", "null or the name of a parameter", given)
    return given


@torch.no_grad()
def check_steps(model: PreTrainedModel) -> None:
    """Check the steps that integer weights and inputs are multiplied with; exports write none but positive numbers.

    Raises:
        ExportError: If one is not finite, or not above 0.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("_scale"):
            _check_step(name, parameter)
        inner = getattr(type(parameter), "tensor_data_names", ())  # torchao's weights are tensors made of others
        for part in inner if "scale" in inner else ():
            if part.endswith("scale"):
                _check_step(f"{name}, {part}", getattr(parameter, part))


def _check_step(name: str, step: Tensor) -> None:
    values = step.detach().float()
    if values.is_meta or (bool(torch.isfinite(values).all()) and bool((values > 0).all())):
        return
    raise ExportError(
        f"model.safetensors: {name!r} holds steps that are no finite numbers above 0. The file is damaged; export the "
        "model again."
    )


def _damaged(key: str, allowed: str, given: Any) -> ExportError:
    return ExportError(f"{WHERE}.{key}: expected {allowed}, got {str(given)[:80]}. The file is damaged or was edited.")
