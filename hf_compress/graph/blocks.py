"""Attention and feed-forward blocks that can lose all of their units: what is left is the output projection's bias.

Reshapes of attention code do not work without elements, so the whole module that computes attention is replaced by
one that passes nothing on, see ``empty_block``. Feed-forward parts made of Linear layers need no such thing: they work
without units.
"""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.graph.capture import ModuleCall, is_hidden_state
from hf_compress.graph.groups import BlockSite, ConsumerSlice
from hf_compress.graph.integers import Attribute

CACHE_INDEX = "layer_idx"
"""Attribute with which transformers' attention modules find their place in a key-value cache."""


def find_block(
    model: nn.Module, calls: Iterable[ModuleCall], live: set[fx.Node], module: str, gates: tuple[ConsumerSlice, ...]
) -> BlockSite | None:
    """Return the block in which ``module`` computes attention, or None if it cannot be emptied.

    Args:
        model: The analyzed model.
        calls: Its recorded module calls.
        live: Nodes on which the output depends.
        module: Where attention is computed.
        gates: The consumers of its heads.
    """
    mine = [call for call in calls if call.module == module]
    readers = {gate.module for gate in gates}
    if len(mine) != 1 or len(readers) != 1 or not module:
        return None
    (call,), (reader,) = mine, readers
    reads = [other for other in calls if other.module == reader]
    inner = reader.startswith(f"{module}.")
    first = next((node for node in call.outputs if node is not None), None)
    projections = (nn.Linear, Conv1D) if inner else nn.Linear
    if len(reads) != 1 or first is None or not isinstance(model.get_submodule(reader), projections):
        return None
    if CACHE_INDEX in vars(model.get_submodule(module)) and _mixes_layer_types(model):
        return None  # a cache has places of several kinds, so the others could not move up
    given = next((node for node in call.inputs if node is not None and node.meta["dtype"].is_floating_point), None)
    if given is None or given.meta["shape"][:-1] != first.meta["shape"][:-1]:
        return None
    linked = reads[0].outputs[:1] if inner else reads[0].inputs[:1]
    others = [node for node in call.outputs if node is not None and node is not first]
    if linked != [first] or any(user in live for node in others for user in node.users):
        return None
    return BlockSite(module, reader[len(module) + 1 :] if inner else None, call.length)


def _mixes_layer_types(model: nn.Module) -> bool:
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    return any(len(set(getattr(config, "layer_types", None) or ())) > 1 for config in configs)


def empty_block(module: nn.Module, output: str | None, length: int | None) -> None:
    """Turn a module that computes attention into one that passes nothing on, in place.

    Args:
        module: The module; it keeps its attributes and, if ``output`` is given, that submodule.
        output: Name of the output projection within the module; its weight has no columns.
        length: Number of results to return in a tuple, the others None; or None for one tensor.
    """
    projection = module.get_submodule(output) if output is not None else None
    module._modules.clear()
    module._parameters.clear()
    module._buffers.clear()
    if output is not None and projection is not None:
        parent = module
        *path, last = output.split(".")
        for name in path:
            parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, projection)
    module.__dict__["_emptied"] = (output, length)
    module.__class__ = EmptyBlock


class EmptyBlock(nn.Module):
    """What is left of a block without units; made by ``empty_block`` only.

    It is no instance of the block's own class any more: initialization code would look for its layers.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output projection's bias, or a tensor of size 0 for a projection outside."""
        output, length = self.__dict__["_emptied"]
        given: Tensor = next(x for x in tree_leaves((args, kwargs)) if is_hidden_state(x))
        result = given.new_zeros(*given.shape[:-1], 0)
        if output is not None:
            projection: Any = self.get_submodule(output)
            # Conv1D's own forward does not take tensors without elements.
            weight = projection.weight.t() if isinstance(projection, Conv1D) else projection.weight
            result = F.linear(result, weight, projection.bias)
        return result if length is None else (result, *[None] * (length - 1))


def emptied_blocks(model: nn.Module) -> list[tuple[str, tuple[str | None, int | None]]]:
    """Return the names of emptied modules and how ``empty_block`` was called."""
    return [(name, vars(module)["_emptied"]) for name, module in model.named_modules() if "_emptied" in vars(module)]


def cache_places(model: nn.Module) -> list[Attribute]:
    """Return the numbers of remaining attention modules in the key-value cache, if some were emptied."""
    gone = {name for name, _ in emptied_blocks(model)}
    patterns = {_pattern(name) for name in gone}
    return [
        Attribute(name, (CACHE_INDEX,))
        for name, module in model.named_modules()
        if name not in gone and _pattern(name) in patterns and type(vars(module).get(CACHE_INDEX)) is int
    ]


def close_gaps(model: nn.Module) -> None:
    """Renumber places in the key-value cache: the first one tells how long the sequence is, so it must be used."""
    counts: dict[tuple[str, ...], int] = {}
    for attribute in cache_places(model):
        pattern = _pattern(attribute.module)
        setattr(model.get_submodule(attribute.module), CACHE_INDEX, counts.get(pattern, 0))
        counts[pattern] = counts.get(pattern, 0) + 1


def _pattern(name: str) -> tuple[str, ...]:
    """The same for the same module of every layer."""
    return tuple(part for part in name.split(".") if not part.isdigit())
