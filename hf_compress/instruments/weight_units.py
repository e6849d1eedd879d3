"""The weights of one layer as units: single ones, rows, columns or blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.config import PruningConfig
from hf_compress.errors import TargetError, TrainingError
from hf_compress.instruments.adapters import base_layer
from hf_compress.instruments.attach import leaf_kind
from hf_compress.instruments.leaf import LeafKind
from hf_compress.instruments.mask import ElementMask
from hf_compress.instruments.record import InputWatch
from hf_compress.instruments.sharded import add_in_place, whole
from hf_compress.instruments.units import Readings
from hf_compress.instruments.weight_cut import WeightCut
from hf_compress.pruning.method import Method, Reading


class WeightEvidence(Readings):
    """What there is to know about the weights of one layer, cut into units.

    Args:
        name: Full name of the weight.
        parameter: The weight.
        kind: How the layer uses it.
        config: Says what a unit is: ``granularity`` and ``block_size``.
        groups: Number of groups of channels that a convolution keeps apart.

    Raises:
        TargetError: If the layer's sizes do not fit the granularity.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, kind: LeafKind, config: PruningConfig, groups: int = 1
    ) -> None:
        self._name = name
        self._parameter = parameter
        self._kind = kind
        self._groups = groups
        self.cut = WeightCut(name, parameter.shape, kind.weight_in_dim, config)
        self.num_units, self.unit_sizes = self.cut.num_units, self.cut.unit_sizes()

    def weights(self) -> Tensor:
        """Return the weights by unit, [num_units, weights per unit]."""
        return self.cut.by_unit(whole(self._parameter.detach()).float())

    def weight_gradients(self) -> Tensor:
        """Return the gradients by unit, as the optimizer gets them.

        Raises:
            TrainingError: If there are none.
        """
        if self._parameter.grad is None:
            raise self._no_gradient()
        return self.cut.by_unit(whole(self._parameter.grad).float())

    def gate_gradients(self) -> Tensor:
        """Return d loss / d gate: the sum of weight * gradient, [num_units]."""
        return (self.weights() * self.weight_gradients()).sum(dim=1)

    def by_unit(self, channels: Tensor) -> Tensor:
        """Return the number of each weight's input channel, [num_units, weights per unit].

        Args:
            channels: One number per input channel of the layer, all groups of a convolution one after the other.
        """
        in_dim, shape = self._kind.weight_in_dim, self._parameter.shape
        outputs = shape[1 - in_dim]
        by_group = channels.view(self._groups, 1, -1)
        rows = by_group.expand(-1, outputs // self._groups, -1).reshape(outputs, -1)
        matrix = rows.t() if in_dim == 0 else rows
        spread = matrix.view(*matrix.shape, *[1] * (len(shape) - 2)).expand(shape)
        return self.cut.by_unit(spread)

    def columns(self) -> Tensor:
        """Return the magnitude of each weight, [num_units, weights per unit]."""
        return self.weights().abs()

    def add_to_gradients(self, change: Tensor) -> None:
        """Add to the gradients of the weights, [num_units, weights per unit].

        Raises:
            TrainingError: If they are frozen.
        """
        if not self._parameter.requires_grad:
            raise self._no_gradient()
        if self._parameter.grad is not None:
            add_in_place(self._parameter.grad, self.cut.weight_shaped(change))

    def _no_gradient(self) -> TrainingError:
        return TrainingError(
            f"the weight {self._name!r} got no gradient, so its criterion has nothing to go by. Is it frozen, or "
            "not used in training? Leave it out with exclude=(...)."
        )


class WeightUnits:
    """The units of the weight of one Linear, Conv1D or convolution.

    Args:
        name: The module's name.
        module: The module.
        config: Says what a unit is.
        method: What the units will be scored by.

    Raises:
        TargetError: If the layer's sizes do not fit the granularity, or its weight cannot be masked.
    """

    def __init__(self, name: str, module: nn.Module, config: PruningConfig, method: Method) -> None:
        self.name = f"{name}.weight"
        kind = leaf_kind(name, module)
        if base_layer(module) is not module:
            raise TargetError(f"{self.name!r} has an adapter; single weights of adapted layers cannot be pruned.")
        parameter: Any = module.weight
        self._parameter: nn.Parameter = parameter
        groups: Any = getattr(module, "groups", 1)
        self._channels = parameter.shape[kind.weight_in_dim] * groups
        self.evidence = WeightEvidence(self.name, parameter, kind, config, groups)
        self.num_units = self.evidence.num_units
        self._mask = ElementMask(name, module, straight_through=config.regrow)
        self._watch = InputWatch(name, module, method.statistic) if "activations" in method.reads else None

    def blank(self) -> Mapping[Reading, Tensor]:
        """Return zeros of the shapes that ``take`` returns."""
        if self._watch is None:
            return {}
        return {"activations": torch.zeros(self._channels + 1, device=self._parameter.device)}

    def take(self) -> Mapping[Reading, Tensor | None]:
        """Return what this rank gathered in a step; gradients of weights are averaged already."""
        return {} if self._watch is None else {"activations": self._watch.take()}

    def set_mask(self, mask: Tensor) -> None:
        """Keep the units where ``mask`` [num_units] is True."""
        self.evidence.kept = float(mask.float().mean())
        self._mask.set_mask(self.evidence.cut.weight_shaped(mask).to(self._parameter.device))

    def set_values(self, training: Tensor, evaluation: Tensor) -> None:
        """Refuse: the weights are factors themselves.

        Raises:
            TargetError: Always.
        """
        raise TargetError(f"{self.name!r}: single weights have no factors; prune a dimension group instead.")

    def fold(self, mask: Tensor, factors: Tensor | None) -> bool:
        """Zero the pruned weights."""
        self._mask.fold()
        return True

    def stop_reading(self) -> None:
        """Leave the mask alone in place."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def remove(self) -> None:
        """Take everything off."""
        self.stop_reading()
        self._mask.remove()
