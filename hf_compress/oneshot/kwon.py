"""Kwon et al.'s pruning without training, on the heads and feed-forward units of a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_compress.errors import TargetError
from hf_compress.graph.groups import DimensionGroup
from hf_compress.instruments.gate import Gate, gated
from hf_compress.oneshot.calibration import Calibration, check_finite
from hf_compress.oneshot.linear import LinearLayer, UnitReader, unit_readers
from hf_compress.oneshot.request import Found, Job
from hf_compress.oneshot.scores import LABELS, check_informative, collect_gradients
from hf_compress.pruning.criteria.oneshot import KwonOptions
from hf_compress.pruning.kwon import Family, Reconstruction, rearrange, search_masks, tune_scales


def search_and_tune(job: Job) -> Found:
    """Choose masks by the Fisher information of gates, rearrange them, and scale what stays.

    Source: Kwon et al. 2022, arXiv:2204.09656; see ``hf_compress.pruning.kwon``.
    """
    options = job.config.method_options()
    assert isinstance(options, KwonOptions)
    groups = job.groups
    # Found out before anything is measured; it takes long.
    readers = {name: unit_readers(job.model, group) for name, group in groups.items()} if options.tune else {}
    gradients = collect_gradients(job, per_example=True)
    fisher = {name: values.square().mean(0) for name, values in gradients.items()}
    check_informative(fisher, "gradients are", LABELS)
    masks = job.allocate(fisher) if options.flops is None else _within_budget(job, fisher, options.flops)
    if options.rearrange:
        masks = {name: rearrange(mask, gradients[name], groups[name].fixed_units) for name, mask in masks.items()}
    if options.tune:
        _tune(job, groups, readers, masks, options.damping)
    return Found(masks, fisher)


def _within_budget(job: Job, fisher: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Choose masks that keep a share of the operations of a forward pass."""
    costs = job.graph.costs
    whole = costs.flops({})
    groups = job.groups
    cost = {name: float(whole - costs.flops({name: group.num_units - 1})) for name, group in groups.items()}
    others = whole - sum(cost[name] * group.num_units for name, group in groups.items())
    families, limits = [], job.limits()
    for kind in ("heads", "ffn"):
        mine = {name: layer for name, layer in limits.items() if groups[name].kind == kind}
        floors = {name: layer.floor() for name, layer in mine.items()}
        families.append(Family({name: fisher[name] for name in mine}, {name: cost[name] for name in mine}, floors))
    if share * whole < others:
        raise TargetError(
            f"prune_oneshot: flops={share} of a forward pass is asked for, but {others / whole:.4f} of its operations "
            f"are in nothing that {', '.join(job.config.structures)} could remove. Keep more, or name more structures."
        )
    return search_masks(families[0], families[1], share * whole - others)


def _tune(
    job: Job,
    groups: Mapping[str, DimensionGroup],
    readers: Mapping[str, Sequence[UnitReader]],
    masks: Mapping[str, Tensor],
    damping: float,
) -> None:
    """Scale kept units, layer by layer, so that each makes up for what is lost up to there, and fold the scales."""
    layers = {each.layer.name: each.layer for found in readers.values() for each in found}
    place = {name: i for i, name in enumerate(n for stage in job.calibration.stages(layers) for n in stage)}
    order = sorted(groups, key=lambda name: min(place[each.layer.name] for each in readers[name]))
    scales = {name: mask.double() for name, mask in masks.items()}
    with gated(job.model, groups, needs_gradient=False) as gates:
        for number, name in enumerate(order, 1):
            compare = _Comparison(gates, scales, {each.layer.name: each.layer for each in readers[name]})
            compare.run(job.calibration, f"Tuning layer {number} of {len(order)}")
            parts = [
                Reconstruction(each.layer.weight(), each.index, *compare.moments(each.layer.name))
                for each in readers[name]
            ]
            scales[name] = tune_scales(masks[name], parts, damping)
    for name, found in readers.items():
        for each in found:
            _fold(job, each, scales[name])


class _Comparison:
    """Inputs of layers in the dense model beside those in the pruned one, over all batches."""

    def __init__(
        self, gates: Mapping[str, Gate], scales: Mapping[str, Tensor], layers: Mapping[str, LinearLayer]
    ) -> None:
        self.gates = gates
        self.scales = scales
        self.layers = layers
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, calibration: Calibration, doing: str) -> None:
        """Run every batch through both models."""
        for number, batch in calibration.each(doing):
            inputs: list[dict[str, list[Tensor]]] = []
            for pruned in (False, True):
                seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}

                def read(name: str, x: Tensor, seen: dict[str, list[Tensor]] = seen) -> None:
                    seen[name].append(x)

                self._set(pruned)
                calibration.inputs_of(number, batch, self.layers, read)
                inputs.append(seen)
            for name in self.layers:
                for dense, small in zip(inputs[0][name], inputs[1][name], strict=True):
                    check_finite(number, name, small)
                    self._add(name, dense.double(), small.double())

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Return sums over tokens of x x^T and y x^T: x in the pruned model, y in the dense one."""
        return self.sums[name]

    def _add(self, name: str, dense: Tensor, small: Tensor) -> None:
        gram, cross = small.T @ small, dense.T @ small
        before = self.sums.get(name)
        self.sums[name] = (gram, cross) if before is None else (before[0] + gram, before[1] + cross)

    def _set(self, pruned: bool) -> None:
        for name, gate in self.gates.items():
            gate.set_mask(self.scales[name] if pruned else torch.ones_like(self.scales[name]))


def _fold(job: Job, reader: UnitReader, scales: Tensor) -> None:
    weight = reader.layer.weight()
    factors = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    factors[reader.index.flatten()] = scales.to(weight.device).repeat_interleave(reader.index.shape[1])
    job.change(reader.layer.name, reader.layer.parameter, reader.layer.as_stored(weight * factors))
