"""Budgets of the whole model: what is left of parameters, operations or time, whichever layers pay for it."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.pruning.budget import Cost, Limits, within_cost


class Budget(Protocol):
    """How much may be left in the end, and which masks keep most within it."""

    def masks(self, scores: Mapping[str, Tensor], limits: Limits, share: float, *, last: bool) -> dict[str, Tensor]:
        """Return masks by layer, True = keep.

        Args:
            scores: Layer name -> [num_units], finite and not negative, higher = keep; comparable between layers.
            limits: What each layer must respect.
            share: Of the way from the dense model to the budget, in [0, 1].
            last: Whether these masks stay.

        Raises:
            TargetError: If the limits do not allow so little.
        """
        ...

    def missed(self, masks: Mapping[str, Tensor]) -> str | None:
        """Return why masks do not meet the budget, or None if they do."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what a resumed run must know, for JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned."""
        ...


class CostBudget:
    """A number of parameters or operations, computed from the numbers of kept units.

    Args:
        name: The setting, for messages.
        cost: Kept units by layer -> cost.
        target: The highest cost in the end; a float is a share of the dense model's.

    Raises:
        ConfigError: If the dense model costs no more than that.
    """

    def __init__(self, name: str, cost: Cost, target: int | float) -> None:
        self._name = name
        self._cost = cost
        self._dense = cost({})
        self._target = target if isinstance(target, int) else int(target * self._dense)
        if self._target >= self._dense:
            raise ConfigError(
                f"PruningConfig.{name}: {target:,} is no less than the {self._dense:,} of the dense model, so nothing "
                "would be removed. Ask for less."
            )

    def masks(self, scores: Mapping[str, Tensor], limits: Limits, share: float, *, last: bool) -> dict[str, Tensor]:
        """Return the masks that keep most score; see ``within_cost``."""
        return within_cost(scores, limits, self._cost, round(self._dense - share * (self._dense - self._target)))

    def missed(self, masks: Mapping[str, Tensor]) -> str | None:
        """Return why masks do not meet the budget, or None if they do."""
        got = self._cost({name: int(mask.sum()) for name, mask in masks.items()})
        if got <= self._target:
            return None
        return f"PruningConfig.{self._name}: asked for {self._target:,}, reached {got:,} of {self._dense:,}"

    def state(self) -> Mapping[str, Any]:
        """Return nothing: costs follow from the model."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""
