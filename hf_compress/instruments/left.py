"""What closed gates leave of features: of heads and channels that are gone the smaller model has none to compare.

Gates act where units are read, so what a model computes up to there is still whole: queries, keys and values of pruned
heads, and pruned channels of hidden states.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from hf_compress.graph.groups import ParameterSlice
from hf_compress.instruments.attach import find_leaf_kind
from hf_compress.instruments.attention_tap import SelfAttention
from hf_compress.instruments.gate import Gate, gates_on, open_units
from hf_compress.instruments.stacks import places

Closed = list[tuple[Gate, Tensor]]
"""Gates, and which of their units are open, bool, [num_units], on the CPU."""


class LeftUnits:
    """Which heads, columns of queries, keys and values, and channels are left by the gates as they are now.

    Gates live on the model's device, which is waited for: make one when masks have changed, not in each pass.

    Args:
        model: A model that gates may be attached to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of_attention: dict[int, Closed] = defaultdict(list)
        """Gates of heads and of their width, by the identity of a module that holds a slice."""
        self._of_layer: dict[tuple[str, int, int], Closed] = defaultdict(list)
        """Gates of channels that layers write, by stack, number of layers and layer."""
        self._known: dict[tuple[object, ...], Tensor | None] = {}
        gates = [gate for gate in gates_on(model) if gate.group.kind in ("heads", "head_dim", "hidden")]
        if not gates:
            return
        flags = torch.cat([open_units(gate) for gate in gates]).cpu()
        where = places(model)
        for gate, is_open in zip(gates, torch.split(flags, [gate.group.num_units for gate in gates]), strict=True):
            if bool(is_open.all()):
                continue
            holders = {id(module): module for module in _holders(gate, writes=gate.group.kind == "hidden")}
            if gate.group.kind != "hidden":
                for key in holders:
                    self._of_attention[key].append((gate, is_open))
                continue
            for place in {where[key][1] for key in holders if key in where}:
                self._of_layer[place.stack, place.count, place.index].append((gate, is_open))

    def channels(self, stack: str, num_layers: int, layer: int, like: Tensor) -> Tensor | None:
        """Return which channels of a hidden state are left, long, on its device; None for all.

        Layers that have the same ones left get the same tensor.

        Args:
            stack: "encoder" or "decoder".
            num_layers: Number of layers of the stack.
            layer: Which of them.
            like: The hidden state, [batch, length, width].
        """
        if not self._of_layer:
            return None
        key = (stack, num_layers, layer, like.shape[-1])
        if key not in self._known:
            gates = self._of_layer.get((stack, num_layers, layer), [])
            if not any(name == stack and count == num_layers for name, count, _ in self._of_layer):
                # Layers that share their modules: each of them writes what any does.
                gates = [each for (name, _, _), found in self._of_layer.items() if name == stack for each in found]
            flags = _open(gates, like.shape[-1])
            same = (tuple(flags.tolist()), like.device)
            if same not in self._known:
                self._known[same] = _indices(flags, like)
            self._known[key] = self._known[same]
        return self._known[key]

    def heads(self, attention: SelfAttention, like: Tensor) -> Tensor | None:
        """Return which query heads of an attention are left, long, on the device of ``like``; None for all."""
        key = (id(attention.module), "heads")
        if key not in self._known:
            self._known[key] = _indices(self._outputs(attention).any(1), like)
        return self._known[key]

    def columns(self, attention: SelfAttention, kind: str, heads: Tensor) -> Tensor | None:
        """Return which columns of queries, keys or values are left where heads lie side by side; None for all.

        Args:
            attention: What they are of.
            kind: "query", "key" or "value".
            heads: The queries, keys or values, [batch, heads, length, head_dim].

        Returns:
            Long, on the device of ``heads``.
        """
        key = (id(attention.module), kind)
        if key not in self._known:
            number, width = heads.shape[1], heads.shape[-1]
            # Keys and values of grouped-query attention go with the last of their queries.
            left = self._outputs(attention).view(number, -1, attention.value_dim).any(1)
            if kind != "value":
                left = left.any(1, keepdim=True).expand(number, width)
                if any(gate.group.sources for gate, _ in self._gates(attention)):
                    # Queries and keys lose width at their producers, which write exact zeros there.
                    left = left & heads.detach().ne(0).any(2).any(0).cpu()
            self._known[key] = _indices(left.flatten(), heads)
        return self._known[key]

    def _gates(self, attention: SelfAttention) -> Closed:
        if not self._of_attention:
            return []
        found = [each for module in attention.module.modules() for each in self._of_attention.get(id(module), ())]
        return list({id(gate): (gate, is_open) for gate, is_open in found}.values())

    def _outputs(self, attention: SelfAttention) -> Tensor:
        """Return what is left of what attention returns, bool, [heads, value_dim]."""
        size = attention.num_heads * attention.value_dim
        return _open(self._gates(attention), size).view(attention.num_heads, -1)


def _holders(gate: Gate, *, writes: bool) -> list[nn.Module]:
    """Return the modules that hold slices of a group; with ``writes`` only leaves that compute its units."""
    found = []
    for part in gate.group.slices:
        module = gate.model.get_submodule(part.parameter.rpartition(".")[0])
        if not writes or _is_written(module, part):
            found.append(module)
    return found


def _is_written(module: nn.Module, part: ParameterSlice) -> bool:
    kind = find_leaf_kind(module)
    return kind is not None and part.parameter.endswith("weight") and part.dim != kind.weight_in_dim


def _open(gates: Closed, size: int) -> Tensor:
    """Return which of ``size`` positions are read through open gates alone, bool, [size]."""
    result = torch.ones(size, dtype=torch.bool)
    for gate, is_open in gates:
        owners = gate.owners.get(size)
        if owners is not None:
            result &= torch.cat([is_open, is_open.new_ones(1)])[owners]
    return result


def _indices(left: Tensor, like: Tensor) -> Tensor | None:
    return None if bool(left.all()) else left.nonzero().flatten().to(like.device)
