"""What tells the data of a run from other data."""

import hashlib
from collections.abc import Iterable, Iterator
from math import gcd
from pathlib import PurePath
from typing import Any

from datasets import Image

from hf_compress.recipe.splits import Splits

MAX_ROWS = 20_000
MAX_BYTES = 64 << 20
_BLOCK = 250
"""Rows that are read at once."""


def data_facts(splits: Splits, columns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the number of examples and a digest of them, for the training and for the evaluation data.

    The digest is of the values in the columns and of their order, the same in every process. It is of all rows up to
    20,000 rows and 64 MiB, and of rows spread evenly over larger data, so that it takes seconds at most: there, a
    change of single rows that leaves their number as it is may go unseen. Images that are files count by their names.

    Args:
        splits: The data as they were loaded.
        columns: Those that the run reads; others, and those that do not exist, do not count. Columns of images do.
    """
    return {
        which: {"examples": len(part), "digest": _digest(part, set(columns))} for which, part in splits.named().items()
    }


def _digest(data: Any, columns: set[str]) -> str:
    pictures = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    names = [name for name in sorted(data.column_names) if name in columns or name in pictures]
    found = hashlib.sha256(repr(names).encode())
    if not names:
        return found.hexdigest()
    rows = data.select_columns(names).with_format("arrow")  # no image is decoded
    left = MAX_BYTES
    for chosen in _blocks(len(data)):
        values = rows[chosen].select(names).to_pylist()
        for row in values:
            for name in set(pictures) & set(names):
                row[name], size = _picture(row[name])
                left -= size
        text = repr(values).encode(errors="surrogatepass")
        found.update(text)
        left -= len(text)
        if left < 0:
            break
    return found.hexdigest()


def _blocks(num_rows: int) -> Iterator[list[int]]:
    """Yield positions in an order of which every beginning is spread evenly, all of them if there are few."""
    step = max(1, round(num_rows * 0.618))
    while gcd(step, num_rows) > 1:  # else some rows would come twice, and others never
        step += 1
    count = min(num_rows, MAX_ROWS)
    for start in range(0, count, _BLOCK):
        yield [number * step % num_rows for number in range(start, min(start + _BLOCK, count))]


def _picture(value: Any) -> tuple[Any, int]:
    """Return what stands for an image, and the bytes that were read for it."""
    if value is None:
        return None, 0
    if value["bytes"] is None:
        return PurePath(str(value["path"])).name, 0
    return hashlib.sha256(value["bytes"]).hexdigest(), len(value["bytes"])
