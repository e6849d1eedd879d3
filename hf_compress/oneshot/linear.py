"""Layers whose inputs are units, or whose single weights go; linear ones are read as [outputs, inputs]."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.errors import TargetError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.instruments.attach import find_leaf_kind, leaf_kind
from hf_compress.instruments.leaf import LeafKind


@dataclass(frozen=True, eq=False)
class OwnLayer:
    """A layer that alone has its weight."""

    name: str
    """Of the module."""

    module: nn.Module

    kind: LeafKind

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module has it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight


class LinearLayer(OwnLayer):
    """A Linear, or anything that computes like one."""

    def weight(self) -> Tensor:
        """Return the weight, [outputs, inputs]; a view."""
        weight = self.parameter.detach()
        return weight if self.kind.weight_in_dim == 1 else weight.T

    def as_stored(self, values: Tensor) -> Tensor:
        """Return a weight or a mask [outputs, inputs] in the shape of the parameter."""
        return values if self.kind.weight_in_dim == 1 else values.T.contiguous()


@dataclass(frozen=True, eq=False)
class UnitReader:
    """A linear layer that reads units of a group."""

    layer: LinearLayer

    index: Tensor
    """Inputs that each unit owns, [num_units, inputs per unit]."""


def own_layer(model: nn.Module, name: str, what: str) -> OwnLayer:
    """Return a layer whose weight may be changed.

    Args:
        model: The model.
        name: Name of the module.
        what: What asks for it, for messages.

    Raises:
        TargetError: If the module is of no known kind, was patched, or shares its weight with another module.
    """
    module = model.get_submodule(name)
    kind = leaf_kind(name, module)
    sharing = next((n for n, each in model.named_modules() if each is not module and _has(each, module.weight)), None)
    if sharing is not None:
        raise TargetError(
            f"{what}: the weight of {name!r} is shared with {sharing!r}, for which it would change, too. Exclude it, "
            "or use another criterion."
        )
    return OwnLayer(name, module, kind)


def linear_layer(model: nn.Module, name: str, what: str) -> LinearLayer:
    """Return a linear layer whose weight may be changed.

    Args:
        model: The model.
        name: Name of the module.
        what: What asks for it, for messages.

    Raises:
        TargetError: If the module is none, or shares its weight with another module.
    """
    module = model.get_submodule(name)
    kind = find_leaf_kind(module)
    if kind is None or not kind.is_linear:
        raise TargetError(
            f"{what}: {name!r} is a {type(module).__name__}; this method needs Linear or Conv1D layers, whose outputs "
            "are sums over their inputs. Exclude it, or choose another method."
        )
    layer = own_layer(model, name, what)
    return LinearLayer(layer.name, layer.module, layer.kind)


def _has(module: nn.Module, weight: object) -> bool:
    return any(parameter is weight for parameter in module.parameters(recurse=False))


def unit_readers(model: nn.Module, group: DimensionGroup) -> list[UnitReader]:
    """Return all that reads the units of a group.

    Raises:
        TargetError: If units act through anything but linear layers: then no update of weights makes up for them.
    """
    what = f"group {group.name!r}"
    if group.sources or group.subsets:
        where = (*(each.module for each in group.sources), *(each.module for each in group.subsets))[0]
        raise TargetError(
            f"{what}: its units act through {where!r} as well, not through linear layers alone, so nothing can make up "
            "for them. Exclude it, or choose another method."
        )
    readers = []
    for part in group.gates:
        layer = linear_layer(model, part.module, what)
        if part.dim != layer.kind.weight_in_dim or model.get_parameter(part.parameter) is not layer.parameter:
            raise TargetError(f"{what}: {part.module!r} reads {part.parameter!r} otherwise than as inputs. Exclude it.")
        readers.append(UnitReader(layer, part.index))
    return readers


class Undo:
    """Remembers weights before they change."""

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}

    def remember(self, parameter: nn.Parameter) -> None:
        """Keep a copy of a parameter's values, the first time."""
        if parameter not in self._before:
            self._before[parameter] = parameter.detach().cpu().clone()

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters that were remembered."""
        return tuple(name for name, parameter in model.named_parameters() if parameter in self._before)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all parameters their old values back."""
        for parameter, values in self._before.items():
            parameter.copy_(values)


@contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """Give remembered parameters their old values back if an error ends the context."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        undo.restore()
        raise
