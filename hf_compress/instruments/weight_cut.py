"""How a weight is cut into what goes as one: single weights, rows, columns or blocks."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.config import PruningConfig
from hf_compress.errors import TargetError
from hf_compress.pruning.allocate import Layer


class WeightCut:
    """The units of one weight, read as [outputs, inputs].

    Args:
        name: Full name of the weight, for messages.
        shape: Of the parameter.
        in_dim: Its dimension of inputs.
        config: Says what a unit is: ``granularity`` and ``block_size``.

    Raises:
        TargetError: If the sizes do not fit the granularity.
    """

    def __init__(self, name: str, shape: torch.Size, in_dim: int, config: PruningConfig) -> None:
        self._parameter_shape = shape
        self._in_dim = in_dim
        self._granularity, self._block, self._pattern = config.granularity, config.block_size, config.pattern()
        rows = self._rows(torch.empty(shape, device="meta"))
        self.shape = (rows.shape[0], rows.shape[1])
        self.num_units = self._by_unit(rows).shape[0]
        if self._pattern is not None and rows.shape[1] % self._pattern[1]:
            raise TargetError(
                f"{name!r} has {rows.shape[1]} inputs, no multiple of {self._pattern[1]}, so granularity "
                f"{config.granularity!r} does not fit. Leave it out with exclude=(...)."
            )

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs of a unit; the last ones of a weight may be smaller."""
        outputs, inputs = self.shape
        sizes = {"row": (1, inputs), "column": (outputs, 1), "block": self._block}
        return sizes.get(self._granularity, (1, 1))

    def run(self, length: Literal["row"] | None) -> int:
        """Return how many neighbouring units compete with each other only: M of N:M, or an output row; else 1.

        Args:
            length: See ``Method.run_length``; rows are those of single weights.
        """
        if self._pattern is not None:
            return self._pattern[1]
        return self.shape[1] if length == "row" and self._granularity == "element" else 1

    def limits(self, config: PruningConfig) -> Layer:
        """Return what an allocation must respect."""
        return Layer(
            num_units=self.num_units,
            min_units=config.min_units,
            max_sparsity=config.max_layer_sparsity,
            shape=str(self.shape),
            unit_sizes=self.unit_sizes(),
        )

    def unit_sizes(self) -> Tensor | None:
        """Return the number of weights of each unit, [num_units]; None for single ones."""
        if self.shape[0] * self.shape[1] == self.num_units:
            return None
        return self._by_unit(torch.ones(self.shape)).sum(dim=1)

    def by_unit(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as [num_units, weights per unit]; smaller units end in zeros."""
        return self._by_unit(self._rows(tensor))

    def weight_shaped(self, units: Tensor) -> Tensor:
        """Return [num_units] or [num_units, weights per unit] as a tensor of the weight's shape."""
        outputs, inputs = self.shape
        if self._granularity == "row":
            rows = units.reshape(outputs, -1).expand(outputs, inputs)
        elif self._granularity == "column":
            rows = units.reshape(inputs, -1).expand(inputs, outputs).t()
        elif self._granularity == "block":
            high, wide = self._block
            down, across = -(-outputs // high), -(-inputs // wide)
            blocks = units.reshape(down * across, -1).expand(down * across, high * wide)
            rows = blocks.reshape(down, across, high, wide).transpose(1, 2).reshape(down * high, across * wide)
            rows = rows[:outputs, :inputs]
        else:
            rows = units.reshape(outputs, inputs)
        return (rows.t() if self._in_dim == 0 else rows).reshape(self._parameter_shape)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as [outputs, inputs]."""
        return tensor.t() if self._in_dim == 0 else tensor.reshape(tensor.shape[0], -1)

    def _by_unit(self, rows: Tensor) -> Tensor:
        if self._granularity == "row":
            return rows
        if self._granularity == "column":
            return rows.t()
        if self._granularity != "block":
            return rows.reshape(-1, 1)
        high, wide = self._block
        padded = F.pad(rows, (0, -rows.shape[1] % wide, 0, -rows.shape[0] % high))
        down, across = padded.shape[0] // high, padded.shape[1] // wide
        return padded.reshape(down, high, across, wide).transpose(1, 2).reshape(-1, high * wide)
