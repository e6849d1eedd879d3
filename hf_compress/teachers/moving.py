"""Whether a teacher says the same about an example wherever in its row it begins, found out by moving one."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.instruments.adapters import without_wrapper
from hf_compress.teachers.inputs import InputSpec
from hf_compress.teachers.live import teacher_outputs

_COLUMNS = 3
"""By how much an example is moved at the most."""

_ROUNDING = 1e-4
"""Differences relative to the largest number that are rounding."""

_COARSE_ROUNDING = 0.03
"""The same for numbers with 8 bits or 11, such as bfloat16."""


def may_move(teacher: nn.Module, inputs: Mapping[str, Any], spec: InputSpec, autocast: torch.dtype | None) -> bool:
    """Return whether padding before an example changes nothing of what a teacher says but rounding.

    It does not where positions are relative (rotary embeddings, T5) or counted without padding (RoBERTa), and does
    where they are absolute (BERT, GPT-2). The longest example of a batch is tried, its end cut off, with padding
    behind and before, so that no model is given more positions than the data has.

    Args:
        teacher: The teacher, wrappers included, in eval mode.
        inputs: One batch.
        spec: Which of its inputs are padded.
        autocast: What to compute in; None: as the weights are.

    Returns:
        False, too, where it cannot be found out.
    """
    mask = spec.counts(inputs, False)
    if mask is None:
        return False
    given, num_columns = _longest(inputs, spec, mask)
    moved = min(_COLUMNS, num_columns - 1)
    if moved < 1:
        return False
    config: Any = without_wrapper(teacher).config
    pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
    behind, before = (_padded(given, spec, num_columns - moved, moved, pad, first) for first in (False, True))
    try:
        said = [_at_positions(teacher_outputs(teacher, each, autocast), spec, each) for each in (behind, before)]
    except (IndexError, RuntimeError, TypeError, ValueError):  # a part of an example may be none
        return False
    is_fine = autocast is None and all(each.dtype.itemsize >= 4 for each in teacher.parameters())
    rounding = _ROUNDING if is_fine else _COARSE_ROUNDING
    return all(_alike(said[0][name].float(), said[1][name].float(), rounding) for name in said[0])


def _longest(inputs: Mapping[str, Any], spec: InputSpec, mask: Tensor) -> tuple[dict[str, Any], int]:
    """Return the longest example of a batch without padding on its own side, and how many columns it has."""
    row = int(mask.flatten(1).sum(1).argmax())
    columns = mask[row].reshape(-1, mask.shape[-1]).any(0).nonzero().flatten()
    given = {name: each[row : row + 1] if isinstance(each, Tensor) else each for name, each in inputs.items()}
    if len(columns) == 0:
        return given, 0
    first, num = int(columns[0]), int(columns[-1]) + 1 - int(columns[0])
    for name in _moving(spec):
        given[name] = given[name].narrow(mask.dim() - 1, first, num)
    return given, num


def _padded(
    given: Mapping[str, Any], spec: InputSpec, num_columns: int, moved: int, pad: int, first: bool
) -> dict[str, Any]:
    """Return an example with its first columns only, and padding before or behind them."""
    found = dict(given)
    dim = given["attention_mask"].dim() - 1
    for name in _moving(spec):
        kept = given[name].narrow(dim, 0, num_columns)
        padding = torch.full_like(given[name].narrow(dim, 0, moved), pad if name.endswith("input_ids") else 0)
        found[name] = torch.cat([padding, kept] if first else [kept, padding], dim)
    return found


def _moving(spec: InputSpec) -> set[str]:
    return {name for name in spec.padded if not name.startswith("decoder_") and name != "labels"} | {"attention_mask"}


def _at_positions(outputs: Mapping[str, Tensor], spec: InputSpec, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    counts = spec.output_counts(inputs)
    per_position = {name: counts is not None and each.shape[:2] == counts.shape for name, each in outputs.items()}
    return {name: each[counts] if per_position[name] else each for name, each in outputs.items()}


def _alike(one: Tensor, other: Tensor, rounding: float) -> bool:
    if one.shape != other.shape or not bool(one.isfinite().all() & other.isfinite().all()) or one.numel() == 0:
        return False
    difference, largest = float((one - other).abs().max()), float(one.abs().max())
    return math.isfinite(difference) and difference <= rounding * largest
