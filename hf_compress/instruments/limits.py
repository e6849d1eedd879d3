"""What an allocation must respect of dimension groups."""

import math
from collections.abc import Iterable

from hf_compress.config import WIDTHS, PruningConfig
from hf_compress.graph.groups import DimensionGroup
from hf_compress.pruning.allocate import Layer


def limits_of(groups: Iterable[DimensionGroup], config: PruningConfig) -> dict[str, Layer]:
    """Return what a config and the groups themselves ask for, by name of the group."""
    return group_limits(
        groups,
        min_units=config.min_units,
        max_sparsity=config.max_layer_sparsity,
        multiple_of=config.multiple_of,
    )


def group_limits(
    groups: Iterable[DimensionGroup], *, min_units: int = 0, max_sparsity: float = 1.0, multiple_of: int = 1
) -> dict[str, Layer]:
    """Return what groups say themselves about how many units they may keep, and more, by name.

    Args:
        groups: The groups to choose in; ties to others are errors later.
        min_units: Keep at least so many where a group would allow fewer.
        max_sparsity: Upper limit of the sparsity of a single group.
        multiple_of: Keep multiples of this in groups whose sizes are those of matrices (``WIDTHS``).
    """
    return {
        group.name: Layer(
            num_units=group.num_units,
            min_units=max(min_units, group.min_units),
            max_sparsity=max_sparsity,
            multiple_of=math.lcm(multiple_of if group.kind in WIDTHS else 1, group.multiple_of),
            fixed_units=group.fixed_units,
            tied_to=group.tied_to,
            shape=f"{group.num_units} of {group.parameters_per_unit}",
        )
        for group in groups
    }
