"""A speed-up or a latency as the budget of a pruning run, measured on the device that trains."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import PruningConfig
from hf_compress.errors import ConfigError, TargetError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.latency.cache import latency_table
from hf_compress.latency.masks import (
    MAX_CORRECTIONS,
    TOLERANCE,
    MeasuredSpeedup,
    masks_within_latency,
    speedup_of,
    tried_masks,
)
from hf_compress.latency.measure import Setup, time_in_turns
from hf_compress.latency.table import LatencyTable
from hf_compress.pruning.budget import Limits
from hf_compress.pruning.whole_model import Budget, CostBudget

Exchange = Callable[[Callable[[], Any]], Any]
"""Calls a function on one rank and returns its plain data on all."""


class LatencyBudget:
    """Masks from a table of latencies; where masks are to stay, the table is corrected by what is measured.

    Args:
        setup: The dense model as it will be deployed, adapters merged, and how it is timed.
        target: ``target_speedup`` or ``target_latency_ms``, and its value.
        exchange: Lets one rank measure for all.
        multiple_of: What feed-forward widths are multiples of.

    Raises:
        ConfigError: If the dense model is as fast as that already.
    """

    def __init__(self, setup: Setup, target: tuple[str, float], exchange: Exchange, *, multiple_of: int = 1) -> None:
        self._setup = setup
        self._name, self._value = target
        self._exchange = exchange
        self._table = LatencyTable.from_json(exchange(partial(self._measured, multiple_of)))
        dense = self._dense = self._table.predict({})
        self._seconds = dense / self._value if self._name == "target_speedup" else self._value / 1000
        if self._seconds >= dense:
            raise ConfigError(
                f"PruningConfig.{self._name}: {self._value:g} is no less than the {dense * 1000:.4g} ms of the dense "
                "model, so nothing would be removed. Ask for less time."
            )

    def _measured(self, multiple_of: int) -> str:
        setup = self._setup
        table = latency_table(setup.model, setup.inputs, multiple_of=multiple_of, graph=setup.graph, timer=setup.timer)
        return table.to_json()

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model the result is to be."""
        return self._dense / self._seconds

    def masks(self, scores: Mapping[str, Tensor], limits: Limits, share: float, *, last: bool) -> dict[str, Tensor]:
        """Return the masks that keep most score in a model that is expected to be so fast.

        The last ones are cut out of a copy and timed, and the table is corrected, see ``tried_masks``. Those that came
        closest are returned.
        """
        seconds = self._dense - share * (self._dense - self._seconds)
        if not last:
            return masks_within_latency(self._table, scores, limits, seconds, self._seconds)
        tries = tried_masks(
            self._table,
            self._dense,
            self.speedup,
            lambda table: masks_within_latency(table, scores, limits, seconds),
            lambda kept: self._exchange(partial(self._ratio, kept)),
        )
        self._table = tries.table
        return tries.closest

    def _ratio(self, kept: Mapping[str, int]) -> float:
        return speedup_of(self._setup, self._setup.copy(kept)).ratio

    def measure(self, small: PreTrainedModel) -> MeasuredSpeedup:
        """Time the shrunk model beside the dense one; again if it misses, for other work may have disturbed it."""

        def closest() -> tuple[float, tuple[float, float]]:
            found = []
            for _ in range(MAX_CORRECTIONS):
                found.append(speedup_of(self._setup, small))
                if abs(found[-1].ratio / self.speedup - 1) <= TOLERANCE:
                    break
            best = min(found, key=lambda each: abs(each.ratio / self.speedup - 1))
            return best.ratio, best.seconds

        ratio, seconds = self._exchange(closest)
        return MeasuredSpeedup(ratio=ratio, seconds=(seconds[0], seconds[1]))

    def check(self, measured: MeasuredSpeedup, advice: str) -> None:
        """Check that the shrunk model is as fast as it should be, and not faster.

        Args:
            measured: What ``measure`` returned.
            advice: What to say of the model at the end of the message.

        Raises:
            TargetError: If it is off by more than the tolerance.
        """
        if abs(measured.ratio / self.speedup - 1) <= TOLERANCE:
            return
        dense, small = (1000 * seconds for seconds in measured.seconds)
        raise TargetError(
            f"PruningConfig.{self._name}: asked for {self._value:g}, which is {self.speedup:.2f} times as fast as the "
            f"dense model; measured {measured.ratio:.2f} ({dense:.4g} ms to {small:.4g} ms), off by more than "
            f"{TOLERANCE:.0%}. Did other work disturb the measurement? {advice}"
        )

    def missed(self, masks: Mapping[str, Tensor]) -> str | None:
        """Return None: what counts is measured on the shrunk model."""
        return None

    def state(self) -> Mapping[str, Any]:
        """Return the table as it is now: masks of a resumed run follow from the same."""
        return {"table": self._table.to_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned."""
        self._table = LatencyTable.from_json(state["table"])
        self._dense = self._table.predict({})
        if self._name == "target_speedup":
            self._seconds = self._dense / self._value


def budget_for(
    config: PruningConfig,
    model: PreTrainedModel,
    graph: ModelGraph,
    example_inputs: Mapping[str, Any] | None,
    exchange: Exchange,
) -> Budget | None:
    """Return the budget that a config asks for, or None if it has none. Measures where one is of time.

    Args:
        config: Names the budget.
        model: The dense model as it will be deployed.
        graph: What is known about it.
        example_inputs: What is timed; inputs of the config's ``latency_shape`` by default.
        exchange: Lets one rank measure for all.

    Raises:
        ConfigError: If the dense model is as fast as that already.
        TargetError: If the model has no structure that can be timed.
    """
    target = config.target()
    if target is None:
        return None
    name, value = target
    if name in ("target_params", "target_flops"):
        return CostBudget(name, graph.costs.parameters if name == "target_params" else graph.costs.flops, value)
    batch, length = config.latency_shape
    inputs = example_inputs or make_example_inputs(model, batch_size=batch, length=length)
    device = next(model.parameters()).device
    inputs = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in inputs.items()}
    setup = Setup(model, graph, inputs, time_in_turns)
    return LatencyBudget(setup, (name, float(value)), exchange, multiple_of=config.multiple_of)
