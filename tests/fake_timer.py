"""A timer without a clock: the time of a model is a function of its weights, times what the machine does to all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def weights_in_layers(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2)


class FakeTimer:
    """See ``hf_compress.latency.measure.Timer``.

    Args:
        milliseconds: Number of weights in the layers -> milliseconds on an idle machine.
        slowdown: What the machine is slowed down by in each round, in turn; the same for all models of the round.
    """

    def __init__(
        self,
        milliseconds: Callable[[int], float] = lambda weights: 1.0 + weights / 1000,
        slowdown: Sequence[float] = (1.0, 3.0, 1.5),
    ) -> None:
        self.milliseconds = milliseconds
        self.slowdown = slowdown
        self.num_models = 0
        self.calls = 0

    def __call__(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Any], rounds: int
    ) -> Mapping[str, Sequence[float]]:
        self.num_models += len(models)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            self.calls += 1
            factor = self.slowdown[self.calls % len(self.slowdown)]
            for name, model in models.items():
                times[name].append(self.milliseconds(weights_in_layers(model)) * factor)
        return times
