"""Which layers learn from which, chosen in every batch by what it costs.

Everything stays on the device: choices are tensors, and no number of them is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_compress.distillation.pairing import find_layer, find_student_layers
from hf_compress.errors import ConfigError, TrainingError, choices

Chooser = Literal["student", "teacher"]
Candidates = Literal["all", "later"] | Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Choice:
    """Pairs of layers, on the device of the costs."""

    student: Tensor
    """Layers of the student, long, [pairs]."""

    teacher: Tensor
    """Layers of the teacher, long, [pairs]."""

    used: Tensor
    """Whether the pair counts: False where the layer that chooses had no candidate, bool, [pairs]."""

    possible: Tensor
    """False where no candidate keeps the order that was asked for, bool, [pairs]."""

    def costs(self, costs: Tensor) -> Tensor:
        """Return what each pair costs, differentiable, 0 where it does not count, inf where none was possible.

        Args:
            costs: Cost of every pair, [student_layers, teacher_layers, ...], for example one for each example.

        Returns:
            [pairs, ...].
        """
        used, possible = (flags.reshape(-1, *[1] * (costs.dim() - 2)) for flags in (self.used, self.possible))
        return costs[self.student, self.teacher].where(possible, torch.inf).where(used, 0.0)


@dataclass(frozen=True, kw_only=True)
class DynamicPairing:
    """How layers are chosen; which of them exist is not known yet."""

    candidates: Candidates = "all"
    """What may be paired: ``"all"``; ``"later"``, student layer i with teacher layers i, i + 1, ...; or a list of
    teacher layers for each student layer, {student: [teacher, ...]}, where layers that are not named take no part.
    Negative layers count from the end."""

    teacher_layers: tuple[int, ...] | None = None
    """The only layers of the teacher that take part, unless candidates are listed; None for all."""

    by: Chooser = "student"
    """``"student"``: each student layer chooses a layer of the teacher, as in NNI's DynamicLayerwiseDistiller;
    ``"teacher"``: each teacher layer chooses a layer of the student (Xia et al. 2022, CoFi, arXiv:2204.00408, section
    3.2)."""

    ordered: bool = False
    """Whether a later layer may not choose an earlier one than its predecessor did; the choices with the least total
    cost are made. If False, each layer chooses for itself."""

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, Mapping) and self.candidates not in ("all", "later"):
            named = choices(self.candidates, ("all", "later"))
            raise ConfigError(f"dynamic pairing: unknown candidates {self.candidates!r}; {named}; or a mapping.")
        if self.by not in ("student", "teacher"):
            raise ConfigError(f"dynamic pairing: unknown by {self.by!r}; {choices(self.by, ('student', 'teacher'))}.")
        if not isinstance(self.ordered, bool):
            raise ConfigError(f"dynamic pairing: ordered is {self.ordered!r}; allowed: True, False.")
        if self.teacher_layers is not None and isinstance(self.candidates, Mapping):
            raise ConfigError("dynamic pairing: candidates list teacher layers already; leave teacher_layers out.")
        if self.teacher_layers is not None and len(self.teacher_layers) == 0:
            raise ConfigError("dynamic pairing: teacher_layers is empty; name one at least, or None for all.")

    def candidate_mask(self, num_student: int, num_teacher: int) -> Tensor:
        """Return which pairs are candidates, bool, [num_student, num_teacher], on the CPU.

        Raises:
            ConfigError: If a layer does not exist, a student layer has no candidate, or no choice keeps the order.
        """
        mask = self._named(num_student, num_teacher)
        without = [layer for layer, allowed in enumerate(mask.any(1).tolist()) if not allowed]
        if without and self.by == "student" and not isinstance(self.candidates, Mapping):
            raise ConfigError(
                f"dynamic pairing: student layers {without} have no candidate among {num_teacher} teacher layers, with "
                f"candidates {self.candidates!r} and teacher_layers {self.teacher_layers}. Use candidates 'all', or "
                "list those of each student layer."
            )
        if self.ordered:
            _check_order(mask if self.by == "student" else mask.T, self.by)
        return mask

    def choose(self, costs: Tensor, candidates: Tensor | None = None, kept: Tensor | None = None) -> Choice:
        """Return the pairs that cost least; see ``choose``."""
        return choose(costs, candidates, kept, by=self.by, ordered=self.ordered)

    def _named(self, num_student: int, num_teacher: int) -> Tensor:
        mask = torch.ones(num_student, num_teacher, dtype=torch.bool)
        if isinstance(self.candidates, Mapping):
            mask.zero_()
            for given, student in find_student_layers(self.candidates, num_student).items():
                for layer in _listed(given, self.candidates[given]):
                    mask[student, find_layer("teacher", layer, num_teacher)] = True
        elif self.candidates == "later":
            mask = mask.triu()
        if self.teacher_layers is not None:
            layers = [find_layer("teacher", layer, num_teacher) for layer in self.teacher_layers]
            mask[:, [layer for layer in range(num_teacher) if layer not in layers]] = False
        return mask


def choose(
    costs: Tensor,
    candidates: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    by: Chooser = "student",
    ordered: bool = False,
) -> Choice:
    """Return for every layer of one model the layer of the other with which it costs least.

    Args:
        costs: Cost of every pair, [student_layers, teacher_layers].
        candidates: Pairs that may be chosen, bool, of the same shape; None for those whose cost is not inf.
        kept: Layers of the student that are not pruned, bool, [student_layers]; the others take no part. None for all.
        by: Whose layers choose.
        ordered: Whether the chosen layers must not decrease, at the least total cost. Layers without candidates do not
            matter to the order. If candidates allow no such choice, what is chosen costs inf.

    Returns:
        One pair for every layer that chooses. It has no gradient; ``Choice.costs`` of the same costs has.

    Raises:
        TrainingError: If shapes do not fit each other.
    """
    _check_shapes(costs, candidates, kept)
    costs = costs.detach()
    allowed = costs != torch.inf if candidates is None else candidates
    if kept is not None:
        allowed = allowed & kept[:, None]
    if by == "teacher":
        costs, allowed = costs.T, allowed.T
    used = allowed.any(1)
    # Zero for layers that take no part: they may choose anything, so they do not constrain the others.
    costs = costs.masked_fill(~allowed, torch.inf).masked_fill(~used[:, None], 0.0)
    chosen = _ordered(costs) if ordered else costs.argmin(1)
    possible = allowed.gather(1, chosen[:, None]).squeeze(1) | ~used
    choosers = torch.arange(len(costs), device=costs.device)
    student, teacher = (choosers, chosen) if by == "student" else (chosen, choosers)
    return Choice(student, teacher, used, possible)


def _ordered(costs: Tensor) -> Tensor:
    """Return the columns, one for each row, that do not decrease and have the least total cost, [rows]."""
    total = costs.new_zeros(costs.shape[1])
    origins = []
    for row in costs:
        # total[j]: of the rows so far, the last one in column j; origin[j] <= j: where the row before was best.
        least, origin = total.cummin(0)
        origins.append(origin)
        total = least + row
    columns = [total.argmin().reshape(1)]
    for origin in reversed(origins[1:]):
        columns.append(origin.gather(0, columns[-1]))
    return torch.cat(columns[::-1])


def _listed(student: int, layers: Sequence[int]) -> Sequence[int]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ConfigError(
            f"dynamic pairing: candidates of student layer {student} are {layers!r}; allowed: a list of one or more "
            "teacher layers. Leave a layer out to let it take no part."
        )
    return layers


def _check_order(choosing: Tensor, by: Chooser) -> None:
    """Let each layer in turn choose the earliest candidate that is left."""
    earliest = 0
    for layer, allowed in enumerate(choosing.tolist()):
        if not any(allowed):
            continue
        left = [column for column, is_candidate in enumerate(allowed) if is_candidate and column >= earliest]
        if not left:
            raise ConfigError(
                f"dynamic pairing: {by} layer {layer} has only candidates before {earliest}, the earliest one that its "
                "predecessors leave. Use ordered=False, or list later candidates."
            )
        earliest = left[0]


def _check_shapes(costs: Tensor, candidates: Tensor | None, kept: Tensor | None) -> None:
    fits = costs.dim() == 2 and costs.numel() > 0
    fits = fits and (candidates is None or (candidates.shape == costs.shape and candidates.dtype == torch.bool))
    if not fits or (kept is not None and (kept.shape != costs.shape[:1] or kept.dtype != torch.bool)):
        shapes = [
            None if tensor is None else (tensor.dtype, list(tensor.shape)) for tensor in (costs, candidates, kept)
        ]
        raise TrainingError(
            f"dynamic pairing: costs, candidates and kept are {shapes}; needed: [student_layers, teacher_layers], bool "
            "of the same shape or None, and bool [student_layers] or None, with one layer at least on each side."
        )
