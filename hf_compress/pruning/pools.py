"""Pools: layers whose units compete, scored by one method, for one sparsity."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.config import PruningConfig
from hf_compress.errors import TargetError, TrainingError
from hf_compress.pruning.allocate import (
    Layer,
    achieved_sparsity,
    allocate,
    bundles,
    check_reachable,
    keep_best,
    protected,
    tolerance,
)
from hf_compress.pruning.method import DeferringMethod, Evidence, Method, is_useful
from hf_compress.pruning.timetable import Timetable
from hf_compress.pruning.whole_model import Budget

LEFTOVER = 1e-6
"""Part of the highest score: what units that are gone may score at most."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What one structure loses in one part of the model; under a budget, what all structures lose."""

    name: str
    """The structure, with the number of the rule where one applies: ``ffn``, ``ffn_rule0``."""

    kinds: Mapping[str, tuple[str, ...]]
    """Structure -> its layers."""

    config: PruningConfig
    """What holds here, rules applied."""

    layers: Mapping[str, Layer]
    """By name."""

    runs: Mapping[str, int]
    """Layer name -> number of neighbouring units that compete with each other only; layers that are missing have no
    such runs."""

    budget: Budget | None = None
    """What is to be left of the whole model, if no sparsity says so."""

    @property
    def kind(self) -> str:
        """The structures, for messages."""
        return ", ".join(self.kinds)

    @property
    def sparsity(self) -> float | None:
        """The sparsity in the end; None if a budget says or the method finds out."""
        structures = self.config.structures
        return structures[self.kind] if isinstance(structures, Mapping) else None

    def check_reachable(self) -> None:
        """Check that the limits of the layers leave room for the sparsity, and that it is more than rounding.

        Raises:
            TargetError: If not.
        """
        if self.sparsity is not None:
            check_reachable(f"structures[{self.kind!r}]", self.sparsity, self.layers, self.config.allocation)

    def within_budget(
        self, scores: Mapping[str, Tensor], now: Mapping[str, Tensor], share: float, *, last: bool
    ) -> dict[str, Tensor]:
        """Return masks within the budget, by scores.

        Without regrowth, what is gone comes back only where nothing else fits into what is left of the budget.

        Args:
            scores: By layer, finite.
            now: The masks so far.
            share: Of the way to the budget.
            last: Whether these masks stay.
        """
        assert self.budget is not None
        lowest = min(float(score.min()) for score in scores.values())
        lifted = {name: score - min(lowest, 0.0) for name, score in scores.items()}
        if not self.config.regrow:  # steps of large units overshoot: what is left over is filled with what is gone
            least = LEFTOVER * max(float(score.max()) for score in lifted.values())
            lifted = {name: score.where(now[name], score.clamp_max(least)) for name, score in lifted.items()}
        return self.budget.masks(lifted, self.layers, share, last=last)

    def allocate(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Return masks of a sparsity, by scores."""
        pattern = self.config.pattern()
        protect = dict(scores)
        for name, run in self.runs.items():
            # Of a share that is no whole number, the rest competes: rounded up, the last runs would pay for all others.
            keep = pattern[0] if pattern is not None else math.floor((1 - sparsity) * run + 1e-9)
            protect[name] = protected(scores[name], run, keep)
        return allocate(protect, sparsity, self.layers, self.config.allocation)

    def check_achieved(self, masks: Mapping[str, Tensor], after: str) -> None:
        """Check at the end that the sparsity was reached.

        Args:
            masks: The final masks.
            after: What to add to the message: when training ended, and why the target may have been missed.

        Raises:
            TargetError: If it was not.
        """
        missed = None if self.budget is None else self.budget.missed(masks)
        if missed is not None:
            raise TargetError(f"{missed} {after}")
        if self.sparsity is None:
            return
        got, allowed = self.achieved(masks), self.tolerance()
        nothing = self.sparsity > 0 and got == 0
        if nothing or abs(got - self.sparsity) > allowed + 1e-9:
            raise TargetError(
                f"PruningConfig.structures[{self.kind!r}]: asked for sparsity {self.sparsity}, reached {got:.4f} "
                f"(tolerance {allowed:.4f}) {after}"
            )

    def achieved(self, masks: Mapping[str, Tensor]) -> float:
        """Return the fraction of units, or of single weights, that masks remove."""
        return achieved_sparsity(masks, self.layers)

    def tolerance(self) -> float:
        """Return how far the achieved sparsity may lie from the one asked for."""
        return tolerance(self.layers, self.config.allocation)


@dataclass(frozen=True, kw_only=True)
class ScheduledPool(Pool):
    """A pool that loses its units while the model trains."""

    method: Method
    timetable: Timetable

    def masks(
        self, step: int, evidence: Mapping[str, Evidence], now: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], float | None]:
        """Return the masks that are due, and the lowest score of what stays.

        Args:
            step: Optimizer steps done so far.
            evidence: By layer.
            now: The masks so far, by layer.

        Raises:
            TrainingError: If the scores do not say what goes, or are not finite.
        """
        scores = {name: self.method.score(name, evidence[name]).float().cpu() for name in self.layers}
        due = self._due(step)
        self._check_scores(scores, now, due)
        if step == self.timetable.end and self.sparsity != 0:
            self._check_learned()
        if self.budget is not None:
            masks = self.within_budget(scores, now, due, last=step == self.timetable.end)
            return self._moved(step, evidence, masks, scores)
        if not self.config.regrow:
            scores = {name: score.masked_fill(~now[name], -math.inf) for name, score in scores.items()}
        threshold = self.method.threshold(self.timetable.share(step))
        masks = self.allocate(scores, due) if threshold is None else self._above(scores, threshold)
        return self._moved(step, evidence, masks, scores)

    def _due(self, step: int) -> float:
        """Return the sparsity that is due, or the share of the way to the budget."""
        deferring = isinstance(self.method, DeferringMethod)
        if self.budget is not None:
            return 1.0 if deferring else self.timetable.share(step)
        final = self.sparsity if self.sparsity is not None else 0.0
        return final if deferring else self.timetable.sparsity(step, final)

    def _moved(
        self,
        step: int,
        evidence: Mapping[str, Evidence],
        masks: dict[str, Tensor],
        scores: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], float | None]:
        """Return the masks with the lowest score kept; a method that defers is only told of them before the end."""
        if isinstance(self.method, DeferringMethod) and step < self.timetable.end:
            for name, mask in masks.items():
                self.method.project(name, evidence[name], mask)
            return {}, None
        kept = [scores[name][mask].min() for name, mask in masks.items() if mask.any()]
        return masks, float(torch.stack(kept).min()) if kept else None

    def _above(self, scores: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
        """Keep what scores at least as high, and what the limits of the layers ask for beyond that."""
        masks = {}
        for bundle in bundles(self.layers):
            steps = bundle.floor
            for name, stride in zip(bundle.names, bundle.strides, strict=True):
                steps = max(steps, -(-int((scores[name] >= threshold).sum()) // stride))
            for name, stride in zip(bundle.names, bundle.strides, strict=True):
                masks[name] = keep_best(scores[name], min(steps * stride, self.layers[name].num_units))
        return masks

    def _check_learned(self) -> None:
        if not any(map(self.method.knows, self.layers)):
            raise TrainingError(
                f"PruningCallback: no gradient told the {self.kind!r} apart by the end of the schedule, so what "
                f"criterion {self.config.criterion!r} learned does not say which are to go. Were all gradients zero or "
                "not finite? Check the loss and its precision."
            )

    def _check_scores(self, scores: Mapping[str, Tensor], now: Mapping[str, Tensor], sparsity: float) -> None:
        for name, score in scores.items():
            if not bool(torch.isfinite(score).all()):
                raise TrainingError(
                    f"PruningCallback: criterion {self.config.criterion!r} gave scores for {name!r} that are not "
                    "finite. Are weights NaN or infinite? Check the loss and its precision."
                )
        if sparsity > 0 and not any(is_useful(scores[name][now[name]]) for name in scores):
            raise TrainingError(
                f"PruningCallback: the scores of all {self.kind!r} are 0 when the first are to go, so nothing says "
                "which. Were all gradients zero or not finite so far? Check the loss and its precision, or begin later."
            )


def check_decided(pools: Iterable[Pool], masks: Mapping[str, Tensor], after: str) -> None:
    """Check at the end that methods which find out themselves how much goes removed anything at all.

    Args:
        pools: All pools of a run.
        masks: The final masks, by layer.
        after: What to add to the message: when training ended.

    Raises:
        TargetError: If they did not.
    """
    deciding = [pool for pool in pools if pool.sparsity is None and pool.budget is None]
    if not deciding or not all(masks[name].all() for pool in deciding for name in pool.layers):
        return
    config, kinds = deciding[0].config, ", ".join(dict.fromkeys(pool.kind for pool in deciding))
    raise TargetError(
        f"PruningConfig.criterion: {config.criterion!r} finds out itself how much goes, and removed nothing of {kinds} "
        f"{after} Raise {config.method_options().lever}."
    )
