"""Optimal brain surgeon on the units of a model: what reads them is updated to make up for those that go."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_compress.graph.groups import DimensionGroup
from hf_compress.oneshot.linear import LinearLayer, UnitReader, unit_readers
from hf_compress.oneshot.request import Found, Job, require_finite
from hf_compress.pruning.criteria.oneshot import ObsOptions
from hf_compress.pruning.obs import Consumer, Removal, inverse_hessian, removal_order, without_units


def remove_units(job: Job) -> Found:
    """Remove the units whose loss the others can best make up for, layer by layer.

    Each layer is calibrated on what reaches it once all layers before it are pruned. How many units each loses is up to
    the allocation; where layers compete, by what one unit more would add to the relative output error of its layer, in
    the dense model.

    Source: ZipLM, Kurtic et al. 2023, arXiv:2302.04089.
    """
    groups = job.groups
    readers = {name: unit_readers(job.model, group) for name, group in groups.items()}
    for name, found in readers.items():
        for each in found:
            require_finite(f"weights of {each.layer.name!r}, which read units", name, each.layer.weight())
    layers = {each.layer.name: each.layer for found in readers.values() for each in found}
    order = [name for stage in job.calibration.stages(layers) for name in stage]
    stages = _stages(readers, order)
    scores = {name: torch.zeros(group.num_units) for name, group in groups.items()}
    if any(pool.config.allocation != "per_layer" for pool in job.pools):  # whose counts depend on no score
        scores = _dense_scores(job, groups, readers, stages)
    counts = {name: int((~mask).sum()) for name, mask in job.allocate(scores).items()}
    masks: dict[str, Tensor] = {}
    for number, stage in enumerate(stages, 1):
        grams = _grams(job, readers, stage, f"Pruning layer {number} of {len(stages)}")
        for name in stage:
            masks[name] = _remove(job, groups[name], readers[name], grams, counts[name])
    return Found({name: masks[name] for name in groups}, scores)


def _grams(
    job: Job, readers: Mapping[str, Sequence[UnitReader]], stage: Sequence[str], doing: str
) -> dict[str, Tensor]:
    return job.calibration.grams({each.layer.name: each.layer for name in stage for each in readers[name]}, doing)


def _stages(readers: Mapping[str, Sequence[UnitReader]], order: Sequence[str]) -> list[list[str]]:
    """Return the groups in the order in which they are read, those with a common reader together."""
    place = {name: i for i, name in enumerate(order)}
    by_place = sorted(readers, key=lambda name: min(place[each.layer.name] for each in readers[name]))
    stages: list[tuple[set[str], list[str]]] = []
    for name in by_place:
        modules = {each.layer.name for each in readers[name]}
        joined = [stage for stage in stages if stage[0] & modules]
        stages = [stage for stage in stages if not stage[0] & modules]
        names = [other for _, others in joined for other in others]
        stages.append((modules.union(*(found for found, _ in joined)), [*names, name]))
    return [names for _, names in stages]


def _dense_scores(
    job: Job,
    groups: Mapping[str, DimensionGroup],
    readers: Mapping[str, Sequence[UnitReader]],
    stages: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Return what each unit adds to the relative squared error of its layer when its turn comes, by group.

    A unit is worth at least as much as those that go before it, so that thresholds cut the order of removal.
    """
    scores: dict[str, Tensor] = {}
    limits = job.limits()
    for number, stage in enumerate(stages, 1):
        grams = _grams(job, readers, stage, f"Measuring layer {number} of {len(stages)}")
        for name in stage:
            group = groups[name]
            removable = group.num_units - limits[name].floor()
            removal = _order(job, group, readers[name], grams, removable)
            whole = sum(output_energy(each.layer, grams[each.layer.name]) for each in readers[name])
            added = (removal.errors.diff() / max(whole, 1e-300)).cummax(0).values if removable else removal.errors[1:]
            scores[name] = torch.full((group.num_units,), float(added[-1]) if removable else 1.0, dtype=torch.float64)
            scores[name][removal.order] = added
            kept = torch.ones(group.num_units, dtype=torch.bool)
            kept[removal.order] = False
            scores[name][kept] += 1.0  # more than any unit that may go, whatever rounding does
    return scores


def _order(
    job: Job, group: DimensionGroup, readers: Sequence[UnitReader], grams: Mapping[str, Tensor], count: int
) -> Removal:
    return removal_order([_consumer(job, each, grams) for each in readers], count, group.fixed_units)


def _consumer(job: Job, reader: UnitReader, grams: Mapping[str, Tensor]) -> Consumer:
    options = job.config.method_options()
    assert isinstance(options, ObsOptions)
    weight, gram = reader.layer.weight(), grams[reader.layer.name]
    inverse = inverse_hessian(gram, options.damping)
    return Consumer(weight.to(inverse.device), inverse, reader.index.to(inverse.device))


def output_energy(layer: LinearLayer, gram: Tensor) -> float:
    """Return ``||W X||^2``."""
    weight = layer.weight().double()
    return float((weight @ gram * weight).sum())


def _remove(
    job: Job, group: DimensionGroup, readers: Sequence[UnitReader], grams: dict[str, Tensor], count: int
) -> Tensor:
    """Remove units from all that reads them; return the mask."""
    consumers = [_consumer(job, each, grams) for each in readers]
    gone = removal_order(consumers, count, group.fixed_units).order
    for each, consumer in zip(readers, consumers, strict=True):
        job.change(each.layer.name, each.layer.parameter, each.layer.as_stored(without_units(consumer, gone)))
        _forget(grams[each.layer.name], each.index[gone].flatten())
    mask = torch.ones(group.num_units, dtype=torch.bool)
    mask[gone] = False
    return mask


def _forget(gram: Tensor, columns: Tensor) -> None:
    """Cut inputs off from all others: another group that the layer reads must not make up for its units with them."""
    columns = columns.to(gram.device)
    scale = gram.diagonal().mean()
    gram[columns] = 0.0
    gram[:, columns] = 0.0
    gram[columns, columns] = scale
