"""Run models of any size without their weights: on the meta device, or as shapes only.

A fake tensor has a shape, a type and a device but no data. Under torch's ``FakeTensorMode`` operators compute shapes
alone, so that the forward pass of a model with billions of parameters takes a second and next to no memory.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_map_only

FAKE_DEVICE = "cpu"
"""Fake tensors pretend to be here: models have code for CPUs, but none for the meta device."""

FAKE_EXPERTS = "batched_mm"
"""How experts run on fake tensors: the other implementations need to know which tokens go to which expert."""

VALUE_ERRORS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What fake tensors raise when a forward pass reads values, which they do not have."""


def has_no_weights(model: nn.Module) -> bool:
    """Whether a parameter or buffer of the model is on the meta device."""
    return any(t.is_meta for t in model.parameters()) or any(t.is_meta for t in model.buffers())


@contextmanager
def fake_tensors(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a model fake tensors in place of its own, while the context is open.

    Args:
        model: A model whose weights are on the meta device, or whose weights do not matter.
        inputs: Keyword arguments for ``model.forward``.

    Yields:
        The inputs with fake tensors in them. Afterwards every module has its own tensors and attributes again, tied
        ones still tied, and whatever the forward pass stored in modules is gone.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # The tensors are kept as keys' owners until the end: ids of dead objects could come again.
    replaced: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FAKE_DEVICE)
            replaced[id(tensor)] = (tensor, new)
        return replaced[id(tensor)][1]

    undo = _replace_tensors(model, fake)
    try:
        with mode:
            yield tree_map_only(Tensor, fake, dict(inputs))
    finally:
        for owner, before in undo:
            owner.clear()
            owner.update(before)
        _forget_cached_results(model)


def _replace_tensors(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Replace the tensors that modules hold; return all their attributes as they were."""
    undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        # Parameters and buffers are looked up in two dicts of their own; plain tensors are ordinary attributes.
        owners: list[dict[str, Any]] = [vars(module), module._parameters, module._buffers]
        for owner in owners:
            undo.append((owner, dict(owner)))
            owner.update({key: fake(value) for key, value in owner.items() if isinstance(value, Tensor)})
    return undo


def _forget_cached_results(model: nn.Module) -> None:
    """Clear ``functools.lru_cache`` of the model's methods: fake tensors in there would come up in real runs."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    for method in (value for base in classes for value in vars(base).values()):
        if isinstance(method, types.FunctionType) and method.__closure__:
            for cell in method.__closure__:
                _clear(cell)
        elif hasattr(method, "cache_clear"):
            method.cache_clear()


def _clear(cell: types.CellType) -> None:
    try:
        clear = getattr(cell.cell_contents, "cache_clear", None)
    except ValueError:  # an empty cell
        return
    if callable(clear):
        clear()
