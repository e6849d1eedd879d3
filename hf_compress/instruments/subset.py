"""Run a norm or a router on the kept units alone, as the smaller model will.

Zeroed units would still enter the statistics of a LayerNorm, and a router would still choose experts that are gone.
So the module's own forward runs on the kept positions of its inputs and parameters, and its results are put back in
their places: zeros where units are gone, and original numbers where results are numbers of units.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_compress.graph.groups import DimensionGroup, ParameterSlice
from hf_compress.graph.subsets import SubsetSite, TensorSite
from hf_compress.instruments.attach import attach, attachment_of, detach_if_empty


class SubsetGate:
    """The norms and routers of one dimension group.

    Several groups may share a module (a dimension that is cut into parts elsewhere): each takes its own units away.
    """

    def __init__(self, group: DimensionGroup, model: nn.Module) -> None:
        self._installed: list[tuple[nn.Module, SubsetRun, _Member]] = []
        for site in group.subsets:
            module = model.get_submodule(site.module)
            attachment = attach(site.module, module)
            if attachment.subset is None:
                attachment.subset = SubsetRun()
            run = attachment.subset
            assert isinstance(run, SubsetRun)
            prefix = f"{site.module}."
            parts = (*group.slices, *group.buffers)
            inside = [part for part in parts if part.parameter.rpartition(".")[0] + "." == prefix]
            member = _Member(site, inside, group.num_units)
            run.members.append(member)
            self._installed.append((module, run, member))

    def set_mask(self, mask: Tensor) -> None:
        """Keep the units where ``mask`` [num_units] is True."""
        for _, _, member in self._installed:
            member.mask = mask.detach().bool().cpu()

    def remove(self) -> None:
        """Detach from all modules."""
        for module, run, member in self._installed:
            attachment = attachment_of(module)
            if attachment is None or member not in run.members:
                continue
            run.members.remove(member)
            if not run.members and attachment.subset is run:
                attachment.subset = None
            detach_if_empty(module)
        self._installed.clear()


class _Member:
    """What one group takes away from one module."""

    def __init__(self, site: SubsetSite, parameters: list[ParameterSlice], num_units: int) -> None:
        self.site = site
        self.parameters = parameters
        self.mask = torch.ones(num_units, dtype=torch.bool)

    def is_open(self) -> bool:
        return bool(self.mask.all())

    def dropped(self, index: Tensor) -> Tensor:
        """Return the positions of units that are gone."""
        return index[~self.mask].flatten()


class SubsetRun:
    """Runs one module on what all groups keep; a ``CallTransform``."""

    def __init__(self) -> None:
        self.members: list[_Member] = []

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``forward`` on the kept positions."""
        members = [member for member in self.members if not member.is_open()]
        if not members:
            return forward(*args, **kwargs)
        given = _on_tensors((args, kwargs), [(m, s) for m in members for s in m.site.inputs], _take)
        with _smaller(module, members):
            result = forward(*given[0], **given[1])
        return _on_tensors(result, [(m, s) for m in members for s in m.site.outputs], _put_back)


Sites = list[tuple[_Member, TensorSite]]


def _on_tensors(values: Any, sites: Sites, change: Callable[[Tensor, Sites], Tensor]) -> Any:
    leaves, structure = tree_flatten(values)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    by_position: dict[int, Sites] = {}
    for member, site in sites:
        by_position.setdefault(tensors[site.position], []).append((member, site))
    for i, mine in by_position.items():
        leaves[i] = change(leaves[i], mine)
    return tree_unflatten(leaves, structure)


def _take(x: Tensor, sites: Sites) -> Tensor:
    for dim, kept, _ in _kept_by_dim(sites):
        x = x.index_select(dim, kept.to(x.device))
    return x


def _put_back(x: Tensor, sites: Sites) -> Tensor:
    numbers = [(member, site) for member, site in sites if site.dim is None]
    if numbers:
        x = _kept(numbers).to(x.device)[x]
    for dim, kept, size in _kept_by_dim(sites):
        full = list(x.shape)
        full[dim] = size
        x = x.new_zeros(full).index_copy(dim, kept.to(x.device), x)
    return x


def _kept_by_dim(sites: Sites) -> Iterator[tuple[int, Tensor, int]]:
    """Yield, per dimension, the positions that all groups keep and the full size."""
    for dim in dict.fromkeys(site.dim for _, site in sites if site.dim is not None):
        mine = [(member, site) for member, site in sites if site.dim == dim]
        yield dim, _kept(mine), mine[0][1].size


def _kept(sites: Sites) -> Tensor:
    """Return the positions along one dimension that all groups keep."""
    keep = torch.ones(sites[0][1].size, dtype=torch.bool)
    for member, site in sites:
        keep[member.dropped(site.index)] = False
    return keep.nonzero().flatten()


@contextmanager
def _smaller(module: nn.Module, members: list[_Member]) -> Iterator[None]:
    """Let the module have the kept part of its parameters and buffers, and sizes to match."""
    holders: list[dict[str, Any]] = [module._parameters, module._buffers]
    saved = [dict(holder) for holder in holders]
    attributes: dict[str, Any] = {}
    by_name: dict[str, list[tuple[_Member, ParameterSlice]]] = {}
    for member in members:
        for part in member.parameters:
            by_name.setdefault(part.parameter.rpartition(".")[2], []).append((member, part))
    for path, size in _sizes(members).items():
        name = str(path[0])
        attributes.setdefault(name, getattr(module, name))
        _set_size(module, name, path[1:], size)
    try:
        for holder in holders:
            for name in by_name.keys() & holder.keys():
                holder[name] = _slice(holder[name], by_name[name])
        yield
    finally:
        for holder, before in zip(holders, saved, strict=True):
            holder.update(before)
        for name, value in attributes.items():
            setattr(module, name, value)


def _sizes(members: list[_Member]) -> dict[tuple[str | int, ...], int]:
    """Return the sizes that the module's integers come to; units of several groups may own the same positions."""
    keep: dict[tuple[str | int, ...], Tensor] = {}
    for member in members:
        for site in member.site.attributes:
            keep.setdefault(site.path, torch.ones(site.size, dtype=torch.bool))[member.dropped(site.index)] = False
    return {path: int(kept.sum()) for path, kept in keep.items()}


def _set_size(module: nn.Module, name: str, rest: tuple[str | int, ...], size: int) -> None:
    value = getattr(module, name)
    if not rest:
        setattr(module, name, size)
    elif len(rest) == 1 and isinstance(rest[0], int):
        setattr(module, name, type(value)(size if i == rest[0] else v for i, v in enumerate(value)))


def _slice(parameter: Tensor, parts: list[tuple[_Member, ParameterSlice]]) -> Tensor:
    for dim in dict.fromkeys(part.dim for _, part in parts):
        keep = torch.ones(parameter.shape[dim], dtype=torch.bool)
        for member, part in parts:
            if part.dim == dim:
                keep[member.dropped(part.index)] = False
        parameter = parameter.index_select(dim, keep.nonzero().flatten().to(parameter.device))
    return parameter
