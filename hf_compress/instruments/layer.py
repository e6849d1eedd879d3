"""One gate per whole layer: at 0 the layer passes its input on, as if it were not there."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hf_compress.graph.capture import is_hidden_state
from hf_compress.graph.groups import DimensionGroup
from hf_compress.instruments.attach import attach, attachment_of, detach_if_empty


class LayerGates:
    """The gates of one list of layers.

    What a layer computes beside its main result still reaches the others (T5's first layer makes the position bias
    for all), just as it does when the layer is removed and the bias moves to the next.
    """

    def __init__(self, group: DimensionGroup, model: nn.Module, value: Tensor) -> None:
        self._modules = [model.get_submodule(name) for name in group.modules]
        self._mixes: list[_Mix] = []
        for index, (name, module) in enumerate(zip(group.modules, self._modules, strict=True)):
            mix = _Mix(value, index)
            self._mixes.append(mix)
            attach(name, module).layer = mix

    def watch(self, record: Callable[[int, Tensor, Tensor], None]) -> None:
        """Have ``record`` called with the layer's number, its input and its output whenever it trains."""
        for mix in self._mixes:
            mix.record = record

    def remove(self) -> None:
        """Detach from all layers."""
        for module in self._modules:
            attachment = attachment_of(module)
            if attachment is not None and attachment.layer in self._mixes:  # another run's may be there since
                attachment.layer = None
                detach_if_empty(module)
        self._modules.clear()


class _Mix:
    """Returns gate * output + (1 - gate) * input; exact at both ends."""

    def __init__(self, value: Tensor, index: int) -> None:
        self.value = value
        self.index = index
        self.record: Callable[[int, Tensor, Tensor], None] | None = None

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        given = next(x for x in tree_leaves((args, kwargs)) if is_hidden_state(x))
        leaves, structure = tree_flatten(result)
        at = next(i for i, x in enumerate(leaves) if is_hidden_state(x))
        if self.record is not None and module.training:
            self.record(self.index, given.detach(), leaves[at].detach())
        gate = self.value[self.index].to(given.dtype)
        leaves[at] = gate * leaves[at] + (1 - gate) * given
        return tree_unflatten(leaves, structure)
