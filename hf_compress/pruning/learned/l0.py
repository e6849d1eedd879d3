"""L0 regularization: gates that are learned as random variables which can be exactly 0 and exactly 1."""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.pruning.criteria.activations import UNITS
from hf_compress.pruning.learned.adam import adam_step, told_apart
from hf_compress.pruning.method import DeferringMethod, Evidence, MethodOptions, Setting
from hf_compress.registry import criteria

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""The interval over which the concrete distribution is stretched before it is cut at 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class L0Options(MethodOptions):
    """Options of ``l0``."""

    learning_rate: float = 1e-2
    """Of the logits, by Adam."""

    multiplier_rate: float = 1e-2
    """Learning rate of the two Lagrange multipliers, by gradient ascent with Adam."""

    def _validate(self) -> None:
        for name in ("learning_rate", "multiplier_rate"):
            self._check_number(name, 0, 10, open_low=True)


@criteria.register("l0")
class L0(DeferringMethod):
    """Hard-concrete gates, whose expected sparsity two Lagrange multipliers drive to the target.

    In training each gate is sampled anew in every step, the same on all ranks; in evaluation it is the clipped mean.
    The target grows with the schedule; at its end the units with the lowest logits go, exactly as many as asked for,
    the gates of the others stand still at their means, and after training these are folded into the weights.

    Options: see ``L0Options``.

    Source: Louizos et al. 2018, arXiv:1712.01312, eq. 10 to 13; Wang et al. 2020, arXiv:1910.04732, eq. 8 (multipliers,
    as in CoFi, arXiv:2204.00408).
    """

    options = L0Options
    reads = frozenset({"gate_gradients"})
    structures = UNITS
    needs_sparsity = True

    def __init__(self, settings: Any, setting: Setting) -> None:
        super().__init__(settings, setting)
        self._layers: list[str] = []
        self._gradients: dict[str, Tensor] = {}

    def start(self, name: str, evidence: Evidence) -> None:
        """Begin with gates that are open: an expected density of about 0.98."""
        device = evidence.weights().device
        self.tensors[name] = torch.full((evidence.num_units,), 2.5, device=device)
        self._layers.append(name)
        self.tensors[f"{name}/draws"] = torch.zeros((), dtype=torch.long)
        for each in ("linear", "quadratic"):
            self.tensors[f"{self._layers[0]}/{each}"] = torch.zeros(1, device=device)

    def step(self, name: str, evidence: Evidence) -> None:
        """Keep the gradient of the gates as they were sampled."""
        self._gradients[name] = evidence.gate_gradients()

    def end_step(self) -> None:
        """Move logits down and multipliers up the Lagrangian; gradients that are not finite move nothing.

        Nothing waits for the device, so the next step draws anew in either case.
        """
        gradients, self._gradients = self._gradients, {}
        if self.over or not gradients:
            return
        first = self._layers[0]
        linear, quadratic = (self.tensors[f"{first}/{each}"] for each in ("linear", "quadratic"))
        finite = torch.stack([torch.isfinite(each).all().to(linear.device) for each in gradients.values()]).all()
        gap = self.expected_sparsity() - self.share * (self.setting.sparsity or 0.0)
        pressure = linear + 2 * quadratic * gap.float()
        total = sum(len(self.tensors[name]) for name in self._layers)
        for name, gradient in gradients.items():
            logits = self.tensors[name].detach().requires_grad_()
            loss = (gate(logits, self._noise(name)) * gradient.detach()).sum()
            push = pressure.to(logits.device) * density(logits).sum() / total
            (slope,) = torch.autograd.grad(loss - push.squeeze(), logits)
            self._move(name, slope, finite, self.settings.learning_rate)
            self.tensors[f"{name}/draws"] += 1
        for each, ascent in (("linear", gap), ("quadratic", gap**2)):
            self._move(f"{first}/{each}", -ascent.float(), finite, self.settings.multiplier_rate)

    def _move(self, name: str, slope: Tensor, finite: Tensor, learning_rate: float) -> None:
        adam_step(self.tensors, name, slope.where(finite.to(slope.device), math.nan), learning_rate)

    def expected_sparsity(self) -> Tensor:
        """Return the expected share of gates that are 0, over all layers, [1], on the device of the first one."""
        device = self.tensors[self._layers[0]].device
        logits = torch.cat([self.tensors[name].to(device) for name in self._layers])
        mean = density(logits).mean().reshape(1)
        return 1 - (mean if device.type == "mps" else mean.double())  # Apple's GPUs have no float64

    def _noise(self, name: str) -> Tensor:
        """Return this step's uniform noise in (0, 1), [num_units]; the same however often it is asked for."""
        draws = self.tensors[f"{name}/draws"] = self.tensors[f"{name}/draws"].cpu()  # where it is read without waiting
        generator = torch.Generator().manual_seed(self.setting.seed + zlib.crc32(f"{name}/{int(draws)}".encode()))
        logits = self.tensors[name]
        return torch.rand(len(logits), generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the sampled gates and their clipped means; once the schedule is over, the means."""
        with torch.no_grad():
            mean = clipped_mean(self.tensors[name])
            return mean if self.over else gate(self.tensors[name], self._noise(name)), mean

    def knows(self, name: str) -> bool:
        """Return whether gradients told units apart."""
        return told_apart(self.tensors, name)

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the probability that the gate is not 0."""
        return density(self.tensors[name])


def gate(logits: Tensor, noise: Tensor) -> Tensor:
    """Return gates in [0, 1], sampled with uniform noise in (0, 1).

    Source: Louizos et al. 2018, arXiv:1712.01312, eq. 10 and 11.
    """
    concrete = torch.sigmoid((noise.log() - (-noise).log1p() + logits) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def density(logits: Tensor) -> Tensor:
    """Return the probability that each gate is not 0.

    Source: Louizos et al. 2018, arXiv:1712.01312, eq. 12.
    """
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


def clipped_mean(logits: Tensor) -> Tensor:
    """Return what stands for the gates in evaluation.

    Source: Louizos et al. 2018, arXiv:1712.01312, eq. 13.
    """
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)
