"""From scores and a sparsity to masks: who pays, and how much."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.registry import allocators


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What an allocation must respect of a single layer."""

    num_units: int
    """How many units there are."""

    min_units: int = 1
    """Units kept at least, or all if there are fewer; 0 lets the whole layer go."""

    max_sparsity: float = 1.0
    """Largest fraction removed."""

    multiple_of: int = 1
    """Kept counts are multiples of this, or all units."""

    fixed_units: tuple[int, ...] = ()
    """Units that stay, whatever their scores."""

    tied_to: tuple[str, ...] = ()
    """Layers that must keep the same share of their units."""

    shape: str = ""
    """Layers with the same text have the same form."""

    unit_sizes: Tensor | None = None
    """What each unit counts, [num_units]; None where units count alike. Such layers have no ties and no multiples."""

    def floor(self) -> int:
        """Return the smallest number of units that may be kept."""
        wanted = math.ceil(self.num_units * (1 - self.max_sparsity) - 1e-9)
        wanted = max(self.min_units, wanted, len(self.fixed_units))
        return min(-(-wanted // self.multiple_of) * self.multiple_of, self.num_units)

    def counts(self) -> list[int]:
        """Return the numbers of units that may be kept, ascending."""
        return sorted({*range(self.floor(), self.num_units + 1, self.multiple_of), self.num_units})


@dataclass(frozen=True)
class Bundle:
    """Layers that keep the same share of their units; most are alone."""

    names: tuple[str, ...]

    strides: tuple[int, ...]
    """Units of each layer that come or go in one step."""

    num_steps: int
    """Steps in which all units come; the last may be smaller."""

    floor: int
    """Steps that stay at least."""

    def sizes(self, layers: Mapping[str, Layer]) -> Tensor:
        """Return what each step brings, [num_steps]: a number of units, or what they count."""
        counted = layers[self.names[0]].unit_sizes
        if counted is not None:
            return counted
        if self.strides == (1,):
            return torch.ones(()).expand(self.num_steps)  # there may be millions
        sizes = torch.full((self.num_steps,), float(sum(self.strides)))
        whole = sum(layers[name].num_units for name in self.names)
        sizes[-1] -= sizes.sum() - whole
        return sizes


Classes = Callable[[Bundle, Mapping[str, Layer]], str]
"""(bundle, layers by name) -> a text: bundles with the same one compete with each other for what is kept, and
together lose the sparsity asked for."""


@allocators.register("global")
def global_(bundle: Bundle, layers: Mapping[str, Layer]) -> str:
    """The lowest scores of all layers together go, as far as the limits of each layer allow."""
    return ""


@allocators.register("per_layer")
def per_layer(bundle: Bundle, layers: Mapping[str, Layer]) -> str:
    """Every layer loses the same fraction of its units, its lowest scores first."""
    return bundle.names[0]


@allocators.register("isomorphic")
def isomorphic(bundle: Bundle, layers: Mapping[str, Layer]) -> str:
    """Layers of the same form compete; each such class loses the same fraction.

    Source: Fang et al. 2024, arXiv:2407.04616: scores of unlike structures are not on one scale.
    """
    return "|".join(sorted({layers[name].shape for name in bundle.names}))


def allocate(
    scores: Mapping[str, Tensor], sparsity: float, layers: Mapping[str, Layer], allocation: str
) -> dict[str, Tensor]:
    """Choose what stays.

    With steps of several units (``multiple_of``, tied layers), neighbours in rank compete by their mean score.

    Args:
        scores: Layer name -> [num_units], higher = keep; minus infinity for what must not stay before all else goes.
        sparsity: Fraction of all units to remove, in [0, 1].
        layers: The limits of each layer; they win over the sparsity, see ``check_reachable``.
        allocation: A name in ``registry.allocators``.

    Returns:
        Layer name -> bool mask [num_units] on the CPU, True = keep.
    """
    scores = {name: _with_fixed(score.detach().cpu(), layers[name].fixed_units) for name, score in scores.items()}
    masks: dict[str, Tensor] = {}
    for members in classes_of(layers, allocation):
        for name, count in _counts(scores, sparsity, layers, members).items():
            masks[name] = keep_best(scores[name], count)
    return {name: masks[name] for name in scores}


def classes_of(layers: Mapping[str, Layer], allocation: str) -> list[list[Bundle]]:
    """Return the bundles of each class that competes within itself."""
    classes: dict[str, list[Bundle]] = {}
    for bundle in bundles(layers):
        classes.setdefault(allocators.get(allocation)(bundle, layers), []).append(bundle)
    return list(classes.values())


def bundles(layers: Mapping[str, Layer]) -> list[Bundle]:
    """Return the layers, those that are tied together in one bundle."""
    return [_bundle(names, [layers[name] for name in names]) for names in ties(layers)]


def ties(layers: Mapping[str, Layer]) -> list[tuple[str, ...]]:
    """Return the names of layers that keep the same share, together, in the order of ``layers``; most are alone.

    Raises:
        TargetError: If a layer is tied to one that is not there.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in layers:
        if name in found:
            continue
        names = [name]
        for each in names:  # grows while it is read
            for other in layers[each].tied_to:
                if other not in layers:
                    raise TargetError(
                        f"{each!r} must keep the same share of its units as {other!r}, which takes no part. Give both, "
                        "or neither."
                    )
                if other not in names:
                    names.append(other)
        found |= dict.fromkeys(names, tuple(names))
    return list(dict.fromkeys(found.values()))


def _bundle(names: Iterable[str], layers: list[Layer]) -> Bundle:
    if len(layers) == 1:
        strides = [layers[0].multiple_of]
    else:  # equal shares: as many parts as all of them can be cut into
        parts = math.gcd(*(layer.num_units for layer in layers))
        units = [layer.num_units // parts for layer in layers]
        together = math.lcm(
            *(each.multiple_of // math.gcd(each.multiple_of, u) for each, u in zip(layers, units, strict=True))
        )
        strides = [unit * together for unit in units]
    num_steps = max(-(-each.num_units // stride) for each, stride in zip(layers, strides, strict=True))
    floor = max(-(-each.floor() // stride) for each, stride in zip(layers, strides, strict=True))
    return Bundle(tuple(names), tuple(strides), num_steps, min(floor, num_steps))


def _counts(
    scores: Mapping[str, Tensor], sparsity: float, layers: Mapping[str, Layer], members: list[Bundle]
) -> dict[str, int]:
    steps = [_steps(bundle, scores, layers) for bundle in members]
    total = sum(float(sizes.sum()) for _, sizes in steps)
    certain = sum(float(sizes[: bundle.floor].sum()) for bundle, (_, sizes) in zip(members, steps, strict=True))
    values = [found[bundle.floor :] for bundle, (found, _) in zip(members, steps, strict=True)]
    alike = all(bundle.strides == (1,) and layers[bundle.names[0]].unit_sizes is None for bundle in members)
    open_sizes = [sizes[bundle.floor :] for bundle, (_, sizes) in zip(members, steps, strict=True)]
    taken = _best(torch.cat(values), None if alike else torch.cat(open_sizes), (1 - sparsity) * total - certain)
    counts: dict[str, int] = {}
    for bundle, mine in zip(members, taken.split([len(each) for each in values]), strict=True):  # type: ignore[no-untyped-call]
        kept = bundle.floor + int(mine.sum())
        for name, stride in zip(bundle.names, bundle.strides, strict=True):
            counts[name] = min(kept * stride, layers[name].num_units)
    return counts


def _steps(bundle: Bundle, scores: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> tuple[Tensor, Tensor]:
    """Return the mean score of the units that each step brings and its size, [num_steps], those of the floor first."""
    sizes = bundle.sizes(layers)
    if len(bundle.names) == 1 and bundle.strides == (1,):
        score = scores[bundle.names[0]]
        if bundle.floor == 0:
            return score, sizes  # there may be millions, and the order does not matter
        first = keep_best(score, bundle.floor)
        ordered = torch.cat([sizes[first], sizes[~first]]) if layers[bundle.names[0]].unit_sizes is not None else sizes
        return torch.cat([score[first], score[~first]]), ordered
    total, count = torch.zeros(bundle.num_steps), torch.zeros(bundle.num_steps)
    for name, stride in zip(bundle.names, bundle.strides, strict=True):
        ranked = scores[name].float().sort(descending=True).values
        step = torch.arange(len(ranked)) // stride
        total.index_add_(0, step, ranked)
        count.index_add_(0, step, torch.ones(len(ranked)))
    return total / count, sizes


def _best(values: Tensor, sizes: Tensor | None, budget: float) -> Tensor:
    """Return which steps fit, best first, until the next would overshoot by more than it fills; bool [steps].

    Without sizes, each step brings one unit.
    """
    if len(values) == 0:
        return torch.zeros(0, dtype=torch.bool)
    if sizes is None:
        return keep_best(values, min(max(math.floor(budget + 0.5), 0), len(values)))
    order = values.argsort(descending=True, stable=True)
    ordered = sizes[order].double()
    fits = budget - (ordered.cumsum(0) - ordered) >= ordered / 2
    taken = torch.zeros(len(values), dtype=torch.bool)
    taken[order] = fits.cumprod(0).bool()
    return taken


def keep_best(score: Tensor, count: int) -> Tensor:
    """Return a bool mask of the ``count`` highest scores; among equal ones the first stay."""
    if count <= 0 or count >= len(score):
        return torch.full((len(score),), count > 0)
    lowest = score.kthvalue(len(score) - count + 1).values  # linear in the number of scores, unlike sorting
    keep = score > lowest
    equal = (score == lowest).nonzero().flatten()
    keep[equal[: count - int(keep.sum())]] = True
    return keep


def _with_fixed(score: Tensor, fixed: tuple[int, ...]) -> Tensor:
    return score.index_fill(0, torch.tensor(fixed), math.inf) if fixed else score


def protected(score: Tensor, run: int, keep: int) -> Tensor:
    """Return the scores with the ``keep`` highest of every ``run`` neighbours at infinity: others go first.

    Args:
        score: Scores [num_units], ``num_units`` a multiple of ``run``.
        run: How many neighbours compete among themselves.
        keep: How many of them stay.
    """
    runs = score.reshape(-1, run)
    return runs.scatter(1, runs.topk(keep, dim=1).indices, math.inf).flatten()


def check_reachable(where: str, sparsity: float, layers: Mapping[str, Layer], allocation: str) -> None:
    """Check before training that the limits leave room for the sparsity, and that it is more than rounding.

    Raises:
        TargetError: If they do not, or if so little would remove nothing.
    """
    if sparsity == 0:
        return
    removes = False
    for members in classes_of(layers, allocation):
        sizes = [bundle.sizes(layers) for bundle in members]
        total = sum(float(each.sum()) for each in sizes)
        floor = sum(float(each[: bundle.floor].sum()) for bundle, each in zip(members, sizes, strict=True))
        if (1 - sparsity) * total < floor - _half_step(sizes):
            names = [name for bundle in members for name in bundle.names]
            limits = {(layers[n].min_units, layers[n].max_sparsity, layers[n].multiple_of) for n in names}
            told = "; ".join(f"min_units={a}, max_layer_sparsity={b}, multiple_of={c}" for a, b, c in sorted(limits))
            raise TargetError(
                f"{where}: sparsity {sparsity} of {total:g} units leaves {(1 - sparsity) * total:.1f}, but {told} keep "
                f"at least {floor:g}; the highest sparsity allowed here is {1 - floor / total:.4f}."
            )
        removes = removes or sparsity * total > min(float(each.min()) for each in sizes) / 2
    if not removes:
        raise TargetError(
            f"{where}: sparsity {sparsity} is less than half of what goes at once (a unit, multiple_of units, or a "
            "share of all tied layers), so nothing would be removed. Ask for more, for smaller multiples, or leave the "
            "structure out."
        )


def tolerance(layers: Mapping[str, Layer], allocation: str) -> float:
    """Return how far the achieved sparsity may lie from the one asked for: half a step in each class."""
    classes = classes_of(layers, allocation)
    sizes = [[bundle.sizes(layers) for bundle in members] for members in classes]
    return sum(map(_half_step, sizes)) / sum(float(each.sum()) for members in sizes for each in members)


def _half_step(sizes: list[Tensor]) -> float:
    return max(float(each.max()) for each in sizes) / 2


def achieved_sparsity(masks: Mapping[str, Tensor], layers: Mapping[str, Layer] | None = None) -> float:
    """Return the fraction that masks remove.

    Args:
        masks: By layer.
        layers: Say what units count; alike without.
    """
    kept = total = 0.0
    for name, mask in masks.items():
        counted = layers[name].unit_sizes if layers is not None else None
        kept += float(mask.sum()) if counted is None else float(counted[mask].sum())
        total += mask.numel() if counted is None else float(counted.sum())
    return 1 - kept / total
