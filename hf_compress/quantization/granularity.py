"""Which values of a tensor share a step: all, those of a channel, of a token, or of a group of neighbors.

A tensor is seen in two ways. ``blocks`` is for statistics: [blocks, values], one row for each step. ``view`` is for
arithmetic: the tensor itself, or with groups in a dimension of their own, which parameters laid out by ``spread``
broadcast to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from hf_compress.errors import ConfigError, TargetError, choices

KINDS = ("tensor", "channel", "token", "group")


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """What shares one step.

    Raises:
        ConfigError: For an unknown kind, or a setting of another kind.
    """

    kind: str = "tensor"
    """``"tensor"``: everything. ``"channel"``: an index of dimension ``dim``. ``"token"``: a row of the last dimension;
    there are as many as the batch holds, so such ranges are computed at every call. ``"group"``: ``size`` neighbors
    along the last dimension, the inputs of a Linear's weight."""

    dim: int = 0
    """Of ``"channel"``: 0 are the outputs of a Linear's weight, -1 the channels of its input."""

    size: int = 0
    """Of ``"group"``: the last dimension must be a multiple of it."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Granularity.kind: unknown value {self.kind!r}; {choices(self.kind, KINDS)}.")
        if (self.kind == "group") != (self.size != 0) or self.size < 0:
            raise ConfigError(
                f"Granularity.size: got {self.size!r} with kind={self.kind!r}; allowed: an int >= 1 with 'group', "
                "0 with other kinds."
            )
        if self.dim != 0 and self.kind != "channel":
            raise ConfigError(
                f"Granularity.dim: got {self.dim!r} with kind={self.kind!r}; allowed: 0 but for 'channel'."
            )

    def num_blocks(self, shape: Sequence[int]) -> int:
        """Return the number of steps that a tensor of this shape has.

        Raises:
            TargetError: If the shape cannot be divided so.
        """
        self._check(shape)
        if self.kind == "channel":
            return shape[self.dim]
        return {"tensor": 1, "token": prod(shape[:-1]), "group": prod(shape) // max(self.size, 1)}[self.kind]

    def blocks(self, x: Tensor) -> Tensor:
        """Return [blocks, values], one row for all values that share a step; a view where possible.

        Raises:
            TargetError: If the shape cannot be divided so.
        """
        rows = self.num_blocks(x.shape)
        if self.kind == "channel":
            x = x.movedim(self.dim, 0)
        return x.reshape(rows, x.numel() // max(rows, 1))

    def view(self, x: Tensor) -> Tensor:
        """Return ``x``; for groups as [..., inputs / size, size].

        Raises:
            TargetError: If the shape cannot be divided so.
        """
        self._check(x.shape)
        return x.reshape(*x.shape[:-1], -1, self.size) if self.kind == "group" else x

    def restore(self, viewed: Tensor) -> Tensor:
        """Return what ``view`` was given, from its result."""
        return viewed.flatten(-2) if self.kind == "group" else viewed

    def spread(self, parameters: Tensor, shape: Sequence[int]) -> Tensor:
        """Return parameters, one for each row of ``blocks``, so that they broadcast to ``view``.

        Args:
            parameters: [blocks].
            shape: Of the tensor.

        Returns:
            A view: [1, ..., 1] for the tensor, [..., channels, ..., 1] for channels, [..., 1] for tokens,
            [..., inputs / size, 1] for groups.

        Raises:
            TargetError: If the shape cannot be divided so, or has another number of blocks.
        """
        if parameters.numel() != self.num_blocks(shape):
            raise TargetError(
                f"quantization per {self.kind}: got {parameters.numel()} ranges of a tensor of another shape; "
                f"one of shape {tuple(shape)} needs {self.num_blocks(shape)}."
            )
        if self.kind == "channel":
            spread = [1] * len(shape)
            spread[self.dim] = shape[self.dim]
        elif self.kind == "group":
            spread = [*shape[:-1], shape[-1] // self.size, 1]
        else:
            spread = [*(shape[:-1] if self.kind == "token" else [1] * (len(shape) - 1)), 1]
        return parameters.view(spread)

    def apply(self, function: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> Tensor:
        """Return ``function(view of x, *parameters laid out by spread)`` in the shape of ``x``.

        Args:
            function: Elementwise, e.g. ``lambda x, scale, zero: fake_quantize(x, grid, scale, zero)``.
            x: Any tensor.
            parameters: [blocks] each; None is passed on.

        Raises:
            TargetError: If the shape cannot be divided so, or has another number of blocks.
        """
        spread = (None if each is None else self.spread(each, x.shape) for each in parameters)
        return self.restore(function(self.view(x), *spread))

    def _check(self, shape: Sequence[int]) -> None:
        if self.kind == "channel" and not -len(shape) <= self.dim < len(shape):
            raise TargetError(
                f"quantization per channel: dimension {self.dim} of a tensor of shape {tuple(shape)}; allowed: "
                f"{-len(shape)} to {len(shape) - 1}."
            )
        if self.kind in ("token", "group") and not shape:
            raise TargetError(f"quantization per {self.kind}: a single number has no last dimension; use 'tensor'.")
        if self.kind == "group" and shape[-1] % self.size:
            raise TargetError(
                f"quantization per group: {shape[-1]} inputs ({tuple(shape)}) are no multiple of size={self.size}; "
                "choose a size that divides them, exclude this layer, or shrink with multiple_of=size."
            )


PER_TENSOR = Granularity()
PER_TOKEN = Granularity(kind="token")


def per_channel(dim: int = 0) -> Granularity:
    """Return one step for each index of a dimension."""
    return Granularity(kind="channel", dim=dim)


def per_group(size: int) -> Granularity:
    """Return one step for each ``size`` neighbors along the last dimension."""
    return Granularity(kind="group", size=size)
