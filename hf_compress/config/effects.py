"""Which settings of pruning cannot change anything beside which others."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from hf_compress.config.structures import WEIGHTS
from hf_compress.errors import ConfigError
from hf_compress.registry import criteria

N_OF_M = re.compile(r"(\d+):(\d+)")
"""Granularities that are patterns."""


def decides(criterion: str, options: Mapping[str, Any]) -> bool:
    """Return whether a criterion that trains finds out itself how much goes; False for options that it lacks."""
    method = criteria.get(criterion)
    try:
        return bool(method.trains and method.options.from_dict(options).decides)
    except ConfigError:
        return False


def without_effect(
    criterion: str, options: Mapping[str, Any], structures: Collection[str], granularity: str
) -> dict[str, str]:
    """Return the fields that cannot change anything, each with what it is that leaves them without effect."""
    method = criteria.get(criterion)
    found = {} if method.averages else {"score_decay": repr(criterion)}
    if method.defers:
        found |= dict.fromkeys(("regrow", "initial_sparsity"), f"{criterion!r}, which removes everything at the end")
    if decides(criterion, options):
        found |= dict.fromkeys(("allocation", "initial_sparsity"), f"{criterion!r}, which finds out how much goes")
    if criterion == "random":
        found["regrow"] = "'random', whose scores never change"
    if set(structures) == {WEIGHTS} and N_OF_M.fullmatch(granularity):
        fixed = f"granularity {granularity!r}, which says how much goes in every layer"
        found |= dict.fromkeys(("allocation", "max_layer_sparsity"), fixed)
    return found
