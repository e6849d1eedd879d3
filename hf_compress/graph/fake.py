"""Run models of any size without their weights: on the meta device, or as shapes only.

A fake tensor has a shape, a type and a device but no data. Under torch's ``FakeTensorMode`` operators compute shapes
alone, so that the forward pass of a model with billions of parameters takes a second and next to no memory. What
depends on the inputs alone, such as the number of tokens that are no padding, is computed for real beside that:
forward passes decide by it.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAKE_DEVICE = "cpu"
"""Fake tensors pretend to be here: models have code for CPUs, but none for the meta device."""

FAKE_EXPERTS = "batched_mm"
"""How experts run on fake tensors: the other implementations need to know which tokens go to which expert."""

VALUE_ERRORS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What fake tensors raise when a forward pass reads values, which they do not have."""


MAX_KNOWN = 2**20
"""Values are computed beside the shapes for tensors of up to so many elements."""


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
    # Tensors are kept with their fake ones: ids of dead objects could come again.
    replaced: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FAKE_DEVICE)
            # Whether there will be gradients decides how torch multiplies matrices.
            replaced[id(tensor)] = (tensor, new.requires_grad_(tensor.requires_grad))
        return replaced[id(tensor)][1]

    undo = _replace_tensors(model, fake)
    try:
        with mode, _KnownValues(mode) as known:
            yield tree_map_only(Tensor, lambda given: known.remember(fake(given), _copy(given)), dict(inputs))
    finally:
        for owner, before in undo:
            owner.clear()
            owner.update(before)
        _forget_cached_results(model)


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to where fake ones pretend to be: what is given stays, whatever a forward pass writes to it."""
    with unset_fake_temporarily():
        return tensor.detach().to(FAKE_DEVICE, copy=True)


class _KnownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Also computes the values of what depends on the inputs alone."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        # Fake tensors are kept with their values: ids of dead objects could come again.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Note the value of a fake tensor; return the latter."""
        if not value.is_meta and value.numel() <= MAX_KNOWN:
            self._known[id(tensor)] = (tensor, value)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = self._values(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except VALUE_ERRORS:
            if values is not None:
                result = tree_map_only(Tensor, self.mode.from_tensor, values)
            elif func is torch.ops.aten.index.Tensor and all(self._is_known_index(index) for index in args[1]):
                result = func(args[0], self._positions(args[1]))
            else:
                raise
        for leaf, value in zip(tree_leaves(result), tree_leaves(values) if values is not None else (), strict=False):
            if isinstance(leaf, Tensor):
                self.remember(leaf, value)
        return result

    def _values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the operator gives for the values of its arguments; None if some are unknown."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(id(tensor) in self._known or not isinstance(tensor, FakeTensor) for tensor in given)
        if not known or torch.Tag.nondeterministic_seeded in func.tags:
            if func._schema.is_mutable:
                self._forget(given)
            return None
        if func.namespace == "prim" or (not given and not _is_small(args, kwargs)):
            return None
        with unset_fake_temporarily():
            real_args, real_kwargs = tree_map_only(Tensor, self._value, (args, kwargs))
            return func(*real_args, **real_kwargs)

    def _is_known_index(self, index: Tensor | None) -> bool:
        return index is None or index.dtype != torch.bool or id(index) in self._known

    def _positions(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Write masks as the positions where they are true: ``x[mask]`` is ``x[mask.nonzero()]``."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            with unset_fake_temporarily():
                positions = self._value(index).nonzero(as_tuple=True)
            found += [self.mode.from_tensor(position) for position in positions]
        return found

    def _value(self, tensor: Tensor) -> Tensor:
        return self._known[id(tensor)][1] if id(tensor) in self._known else tensor

    def _forget(self, written: list[Tensor]) -> None:
        """Forget values that unknown ones may have been written to, by whatever view."""
        storages = {self._value(tensor).untyped_storage()._cdata for tensor in written if id(tensor) in self._known}
        for key, (_, value) in list(self._known.items()):
            if value.untyped_storage()._cdata in storages:
                del self._known[key]


def _is_small(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator that makes a tensor from numbers alone makes a small one, as ``zeros([2, 3])`` does."""
    return prod(n for n in tree_leaves((args, kwargs)) if type(n) is int and n > 0) <= MAX_KNOWN


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
