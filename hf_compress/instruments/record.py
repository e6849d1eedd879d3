"""Watch what passes through modules while they train: sums over all tokens of an optimizer step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.errors import TargetError
from hf_compress.instruments.attach import attach, attachment_of, detach_if_empty, leaf_kind
from hf_compress.instruments.layer import LayerGates


class InputWatch:
    """The mean of a statistic at each input channel of one module.

    Activation checkpointing runs a module twice and counts every token twice, which leaves means as they are.

    Args:
        name: The module's name, for messages.
        module: A module of a known kind.
        statistic: Elementwise function of the input.

    Raises:
        TargetError: If the input of the module cannot be watched.
    """

    def __init__(self, name: str, module: nn.Module, statistic: Callable[[Tensor], Tensor]) -> None:
        self._channel_dim = leaf_kind(name, module).channel_dim
        self._module = module
        self._statistic = statistic
        self._sums: Tensor | None = None
        attach(name, module).recorders.append(self)

    def __call__(self, x: Tensor) -> None:
        """Add the statistic of an input, [..., channels] or [batch, channels, ...]."""
        values = self._statistic(x).movedim(self._channel_dim, -1)
        values = values.reshape(-1, values.shape[-1])
        sums = torch.cat([values.sum(dim=0), values.new_full((1,), len(values))])
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> Tensor | None:
        """Return the sums and, last, the number of tokens, [channels + 1], and forget them; None if nothing came."""
        sums, self._sums = self._sums, None
        return sums

    def remove(self) -> None:
        """Stop watching."""
        attachment = attachment_of(self._module)
        if attachment is not None and self in attachment.recorders:
            attachment.recorders.remove(self)
            detach_if_empty(self._module)


class ChangeWatch:
    """How much each layer of a list changes the hidden state: 1 - cosine, summed over tokens."""

    def __init__(self, layers: LayerGates, num_layers: int, like: Tensor) -> None:
        self._blank = torch.zeros(num_layers, 2, device=like.device)
        self._sums: Tensor | None = None
        layers.watch(self._record)

    def _record(self, index: int, given: Tensor, returned: Tensor) -> None:
        change = 1 - F.cosine_similarity(given.float(), returned.float(), dim=-1)
        if self._sums is None:
            self._sums = self._blank.clone()
        self._sums[index, 0] += change.sum()
        self._sums[index, 1] += change.numel()

    def take(self) -> Tensor | None:
        """Return sums and numbers of tokens, [num_layers, 2], and forget them; None if no layer ran."""
        sums, self._sums = self._sums, None
        return sums


def watchable(name: str, module: Any, owner: nn.Module | None) -> nn.Module:
    """Return the module whose input is what a gate would multiply.

    Raises:
        TargetError: If the gate multiplies a parameter instead.
    """
    if owner is not None:
        raise TargetError(
            f"module {name!r} is a {type(module).__name__}, whose inputs at that place cannot be watched. Exclude the "
            "group, or choose a criterion that reads weights or gradients, such as 'taylor'."
        )
    watched: nn.Module = module
    return watched
