"""The milestones of a schedule: checked before anything reads what is in them."""

import itertools
from collections.abc import Sequence
from typing import Any

from hf_compress.config.base import MOMENTS, is_moment
from hf_compress.schedule import gap

PAIRS = f"pairs of a moment ({MOMENTS}) and a share in (0, 1], the last share 1, moments and shares growing"


def are_milestones(pairs: Any) -> bool:
    """Return whether a value is what ``PruningConfig.milestones`` may be; moments of one kind grow."""
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        return False
    if not all(isinstance(pair, Sequence) and len(pair) == 2 and is_moment(pair[0]) for pair in pairs):
        return False
    shares = [share for _, share in pairs]
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in shares):
        return False
    grow = all(a < b for a, b in itertools.pairwise([0, *shares]))
    last = not shares or shares[-1] == 1
    gaps = [gap(a, b) for (a, _), (b, _) in itertools.pairwise(pairs)]
    return grow and last and all(each is None or each > 0 for each in gaps)
