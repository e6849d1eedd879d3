"""Finding stored rows by hash, and putting them where a batch has them; nothing here waits for a device."""

from dataclasses import dataclass

import torch
from torch import Tensor

_NUM_SENTINELS = 2


@dataclass(frozen=True)
class KeyTable:
    """Stored examples in the order of their hashes."""

    first: Tensor
    """First half of the hashes, ascending, int64, [examples]."""

    second: Tensor
    """Second half, int64, [examples]."""

    rows: Tensor
    """Number of the example in the order of storage, int64, [examples]."""

    starts: Tensor
    """Number of its first position, int64, [examples]."""

    lengths: Tensor
    """Its number of positions, int64, [examples]."""

    @classmethod
    def of(cls, keys: Tensor, lengths: Tensor) -> "KeyTable":
        """Sort.

        Args:
            keys: int64, [examples, 2], in the order of storage.
            lengths: int64, [examples].
        """
        first, order = keys[:, 0].sort()
        starts = lengths.cumsum(0) - lengths
        return cls(first.contiguous(), keys[order, 1], order, starts[order], lengths[order])

    def to(self, device: torch.device) -> "KeyTable":
        """Return a copy on a device."""
        fields = (self.first, self.second, self.rows, self.starts, self.lengths)
        return KeyTable(*(each.to(device) for each in fields))

    def has_duplicates(self) -> bool:
        """Return whether two examples have the same first half, by which they are found."""
        return bool((self.first[1:] == self.first[:-1]).any())

    def find(self, keys: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find examples.

        Args:
            keys: int64, [batch, 2].
            lengths: Positions that each should have, int64, [batch].

        Returns:
            Numbers of the examples, numbers of their first positions, and whether they are there, bool; each [batch].
        """
        place = torch.searchsorted(self.first, keys[:, 0].contiguous()).clamp_max(len(self.first) - 1)
        same = (self.first[place] == keys[:, 0]) & (self.second[place] == keys[:, 1])
        return self.rows[place], self.starts[place], same & (self.lengths[place] == lengths)


def with_sentinels(tensor: Tensor) -> Tensor:
    """Add two rows at the end: zeros, for padding, and NaN (0 in integers), for what is missing."""
    ends = tensor.new_zeros((_NUM_SENTINELS, *tensor.shape[1:]))
    if tensor.is_floating_point():
        ends[-1] = torch.nan
    return torch.cat([tensor, ends])


def padded_rows(table: Tensor, first: Tensor, counts: Tensor | None, found: Tensor) -> Tensor:
    """Return the rows of the examples of a batch.

    Args:
        table: [rows + 2, ...], see ``with_sentinels``.
        first: Number of the first row of each example, int64, [batch].
        counts: Positions that have a row, bool, [batch, length]; None: each example has one row.
        found: Whether the example is there, bool, [batch].

    Returns:
        [batch, ...] or [batch, length, ...].
    """
    padding, missing = len(table) - _NUM_SENTINELS, len(table) - 1
    if counts is None:
        return table[torch.where(found, first, missing)]
    index = first.unsqueeze(1) + counts.long().cumsum(1) - 1
    index = torch.where(found.unsqueeze(1), index, missing)
    index = torch.where(counts, index, padding)
    return table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])
