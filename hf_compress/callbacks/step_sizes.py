"""Steps that change while a model trains: observed ranges and learned steps, the same on all ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compress.callbacks.owned import OwnedTensors
from hf_compress.callbacks.ranks import elementwise, num_ranks
from hf_compress.errors import TrainingError
from hf_compress.instruments.quantize import Quantized
from hf_compress.instruments.sharded import whole
from hf_compress.instruments.targets import oriented_weight
from hf_compress.quantization.granularity import PER_TENSOR
from hf_compress.quantization.observers import Ema, MinMax, Mse
from hf_compress.quantization.quantizers import LearnedQuantizer


class StepSizes:
    """Watches inputs during an optimizer step, and updates ranges and learned steps at its end.

    A range stays as it is during a step, however often a layer runs: micro-batches and recomputed layers all count
    into the one update that follows.

    Args:
        quantized: The layers.
        device: Where the model is.
        learning_rate: Of learned steps, relative to their first value; None: nothing learns.
    """

    def __init__(self, quantized: Quantized, device: torch.device, learning_rate: float | None) -> None:
        self._device = device
        self._observed = quantized.observed()
        self._learned = quantized.learned()
        self._learning_rate = learning_rate
        self._owned = OwnedTensors()
        self._frozen = False
        for layer in quantized.weighted():
            if isinstance(layer.weights, LearnedQuantizer):
                layer.weights.initialize(whole(oriented_weight(layer.name, layer.module).detach()))
                self._own(f"{layer.name}|weights", layer.weights)

    def collect(self) -> None:
        """Watch from now on, until ``update``."""
        if self._frozen:
            return
        for observed in self._observed.values():
            observed.collector = MinMax(observed.grid)
        for learned in self._learned.values():
            # What has no step yet is counted: its first step is that of the first batches that reach it.
            if not learned.learned and learned.collector is None:
                learned.collector = Mse(learned.grid, PER_TENSOR)

    def update(self, loss_scale: float) -> None:
        """Take in what an optimizer step has shown; every rank must call it.

        Args:
            loss_scale: What fp16 has multiplied the loss by.
        """
        if self._frozen:
            return
        self._update_ranges()
        if self._learning_rate is not None:
            self._owned.step(loss_scale)
            for learned in self._learned.values():
                if learned.learned:
                    learned.constrain()
            self._begin_to_learn()

    def freeze(self) -> None:
        """Leave all as it is from now on."""
        self._frozen = True
        for quantizer in (*self._observed.values(), *self._learned.values()):
            quantizer.collector = None
        for learned in self._learned.values():
            learned.snap()
            for tensor in learned.learned.values():
                tensor.requires_grad_(False)

    def missing(self) -> list[str]:
        """Return the names of tensors that have no step, because nothing came."""
        ranges = [name for name, each in self._observed.items() if not each.observer.state]
        return [*ranges, *(name for name, each in self._learned.items() if not each.learned)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint needs."""
        ranges = {
            f"range/{name}/{key}": tensor
            for name, each in self._observed.items()
            for key, tensor in each.state().items()
        }
        learned = {f"learned/{name}": tensor for name, tensor in self._owned.state().items()}
        rates = {f"rate/{name}": rate for name, rate in self._owned.rates.items() if isinstance(rate, Tensor)}
        return {**ranges, **learned, **rates}, {"frozen": self._frozen}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned.

        Raises:
            TrainingError: If the checkpoint is of other quantizers.
        """
        for name, each in self._observed.items():
            prefix = f"range/{name}/"
            stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            each.load({key: tensor.to(self._device) for key, tensor in stored.items()})
        learned = {key.removeprefix("learned/"): each for key, each in tensors.items() if key.startswith("learned/")}
        self._owned, self._frozen = OwnedTensors(), False
        for name, quantizer in self._learned.items():
            found = {key: learned[f"{name}|{key}"] for key in ("step", "offset") if f"{name}|{key}" in learned}
            if name.endswith("|weights") and not found:
                raise TrainingError(
                    f"quantization: the checkpoint holds no learned step of {name.partition('|')[0]!r}; resume with "
                    "the model and the config that it was written for."
                )
            quantizer.load({key: tensor.to(self._device) for key, tensor in found.items()})
            quantizer.collector = None  # one that was set before would give it another first step
            for key, tensor in quantizer.learned.items():
                self._owned.add(f"{name}|{key}", tensor, tensors[f"rate/{name}|{key}"].to(self._device))
        for name, tensor in learned.items():
            if "/" in name:
                self._owned.tensors[name] = tensor.to(self._device)
        if facts["frozen"]:
            self.freeze()

    def _own(self, name: str, quantizer: LearnedQuantizer) -> None:
        assert self._learning_rate is not None
        rate = self._learning_rate * quantizer.learned["step"].detach().clone()
        for key, tensor in quantizer.learned.items():
            self._owned.add(f"{name}|{key}", tensor, rate)

    def _update_ranges(self) -> None:
        """Join what all ranks saw in this step, in one exchange."""
        if not self._observed:
            return
        nothing = torch.tensor([0.0, torch.inf, torch.inf], device=self._device)
        rows = []
        for each in self._observed.values():
            state = each.collector.state if each.collector is not None else {}
            low_high = [state["low"].float(), -state["high"].float()] if state else []
            rows.append(torch.cat([nothing.new_tensor([-1.0]), *low_high]) if state else nothing)
        joined = torch.stack(rows)
        if num_ranks() > 1:
            joined = elementwise(joined, "min")
            reached = (joined[:, 0] < 0).tolist()
        else:
            reached = [each.collector is not None and bool(each.collector.state) for each in self._observed.values()]
        for each, row, there in zip(self._observed.values(), joined, reached, strict=True):
            each.collector = None
            if there:
                assert isinstance(each.observer, MinMax | Ema)
                each.observer.update(row[1:2], -row[2:3])
                each.settle()

    def _begin_to_learn(self) -> None:
        """Give a first step to what has been watched by all ranks."""
        waiting = {name: each for name, each in self._learned.items() if isinstance(each.collector, Mse)}
        if not waiting:
            return
        there = torch.tensor([bool(each.collector.state) for each in waiting.values()], device=self._device).int()  # type: ignore[union-attr]
        everywhere = elementwise(there, "min").tolist()
        for (name, each), reached in zip(waiting.items(), everywhere, strict=True):
            collector = each.collector
            if not reached or not isinstance(collector, Mse):
                continue
            collector.merge(elementwise)
            each.initialize(collector)
            each.collector = None
            self._own(name, each)
