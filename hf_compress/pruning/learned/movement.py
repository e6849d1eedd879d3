"""Movement pruning: keep what training moves away from zero, not what is large."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.pruning.learned.adam import adam_step, told_apart
from hf_compress.pruning.method import GATED, Evidence, Method, MethodOptions
from hf_compress.registry import criteria


@dataclass(frozen=True, kw_only=True)
class MovementOptions(MethodOptions):
    """Options of ``movement``."""

    lever = "options regular_scale or threshold, or learning_rate"

    mode: str = "hard"
    """``"hard"``: the sparsity asked for is reached exactly. ``"soft"``: units whose ``sigmoid(score)`` lies below the
    threshold go, and ``regular_scale`` steers how many that are."""

    learning_rate: float = 1e-2
    """Of the scores, by Adam."""

    regular_scale: float = 10.0
    """With ``"soft"``: weight of the penalty, the mean of ``sigmoid(score)`` over the units of a layer."""

    threshold: float = 0.1
    """With ``"soft"``: in (0, 1); scores start at ``sigmoid(0) = 0.5``."""

    def _validate(self) -> None:
        self._check_choice("mode", ("hard", "soft"))
        self._check_number("learning_rate", 0, 10, open_low=True)
        self._check_number("regular_scale", 0, 1e6)
        self._check_number("threshold", 0, 1, open_low=True, open_high=True)
        if self.mode == "hard":
            for name in ("regular_scale", "threshold"):
                default = getattr(MovementOptions, name)
                if getattr(self, name) != default:
                    raise self._error(name, getattr(self, name), f'{default} with mode="hard", where it has no effect')

    @property
    def decides(self) -> bool:
        """Whether thresholds find out how much goes."""
        return self.mode == "soft"


@criteria.register("movement")
class Movement(Method):
    """Scores learned with a straight-through estimator: d loss / d score = d loss / d gate.

    A score grows while training makes its unit larger in the direction that lowers the loss. Pruned units go on
    learning their scores, so ``regrow=True`` lets them come back.

    Penalty and threshold of the soft mode grow with the schedule. One score per unit, as in block movement pruning.

    Options: see ``MovementOptions``.

    Source: Sanh et al. 2020, arXiv:2005.07683, sections 3 and 4.1; Lagunas et al. 2021, arXiv:2109.04838 (units).
    """

    options = MovementOptions
    reads = frozenset({"gate_gradients"})
    structures = GATED

    def start(self, name: str, evidence: Evidence) -> None:
        """Begin at 0."""
        self.tensors[name] = torch.zeros(evidence.num_units, device=evidence.weights().device)

    def step(self, name: str, evidence: Evidence) -> None:
        """Move the scores."""
        gradient = evidence.gate_gradients().to(torch.float32)
        if self.settings.decides:
            kept = torch.sigmoid(self.tensors[name])
            gradient = gradient + self.settings.regular_scale * self.share * kept * (1 - kept) / len(kept)
        adam_step(self.tensors, name, gradient, self.settings.learning_rate)

    def knows(self, name: str) -> bool:
        """Return whether gradients told units apart."""
        return told_apart(self.tensors, name)

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the scores; with thresholds, ``sigmoid`` of them."""
        return torch.sigmoid(self.tensors[name]) if self.settings.decides else self.tensors[name]

    def threshold(self, share: float) -> float | None:
        """Return the threshold of ``sigmoid(score)``."""
        return self.settings.threshold * share if self.settings.decides else None
