"""Batches of ragged texts, padded as one likes, for tests of cached teacher outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Text = Sequence[int]


def padded(rows: Sequence[Text], extra: int = 0, side: str = "right", value: int = 0) -> Tensor:
    """Return [rows, longest + extra]."""
    length = max(len(row) for row in rows) + extra
    out = torch.full((len(rows), length), value)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else length - len(row)
        out[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return out


def text_batch(rows: Sequence[Text], extra: int = 0, side: str = "right", pad: int = 0) -> dict[str, Any]:
    """Return token ids and mask."""
    mask = padded([[1] * len(row) for row in rows], extra, side)
    return {"input_ids": padded(rows, extra, side, pad), "attention_mask": mask}


def texts(num_texts: int = 7, longest: int = 9, vocab: int = 50, seed: int = 0) -> list[list[int]]:
    """Return token ids of different texts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (num_texts,), generator=generator).tolist()
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
