"""Single weights, or rows, columns and blocks: chosen, set to zero, and with ``obs`` made up for by the others."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from hf_compress.oneshot.linear import LinearLayer
from hf_compress.oneshot.obs import output_energy
from hf_compress.oneshot.request import Found, Job
from hf_compress.oneshot.scores import own_scores
from hf_compress.pruning.allocate import achieved_sparsity
from hf_compress.pruning.criteria.oneshot import ObsOptions
from hf_compress.pruning.obs import inverse_hessian, sparsegpt
from hf_compress.pruning.obs_blocks import BlockSurgeon
from hf_compress.pruning.pools import Pool


def remove_by_weights(job: Job) -> Found:
    """Remove weights by their own size or by chance, as while training."""
    masks = job.allocate(own_scores(job))
    return Found({name: _zeroed(job, name, mask) for name, mask in masks.items()}, {})


def remove_by_inputs(job: Job) -> Found:
    """Remove weights by ``|W_ij| * ||x_j||_2``, single ones compared within each output: Wanda.

    Source: Sun et al. 2023, arXiv:2306.11695, algorithm 1.
    """
    return _in_turn(job, partial(_wanda_turns, job))


def remove_and_update(job: Job) -> Found:
    """Remove weights layer by layer, and update the others to make up for them.

    Source: single weights and patterns: SparseGPT, Frantar and Alistarh 2023, arXiv:2301.00774; rows, columns and
    blocks: see ``BlockSurgeon``.
    """
    return _in_turn(job, partial(_obs_turns, job))


class _Turn(Protocol):
    """One layer when its turn comes, with the inputs that reach it then."""

    @property
    def layer(self) -> LinearLayer:
        """The layer."""
        ...

    def scores(self) -> Tensor:
        """Return what each unit is worth, [num_units]."""
        ...

    def remove(self, pool: Pool, sparsity: float) -> Tensor:
        """Remove a fraction of the layer's weights; return the mask, of the parameter's shape.

        Args:
            pool: With this layer alone.
            sparsity: The fraction.
        """
        ...


_Turns = Callable[[Sequence[LinearLayer], str], Sequence[_Turn]]
"""(layers with the same input, what to show beside the progress bar) -> their turns."""


def _in_turn(job: Job, turns: _Turns) -> Found:
    """Prune layers in the order in which they run, each on what those before it give once they are pruned.

    How much each loses is settled before: where layers compete, by their scores in the model as it was.
    """
    layers = job.linear_layers()
    stages = [[layers[name] for name in stage] for stage in job.calibration.stages(layers)]
    shares = _shares(job, stages, turns)
    masks: dict[str, Tensor] = {}
    for number, stage in enumerate(stages, 1):
        for turn in turns(stage, f"Pruning layers {number} of {len(stages)}"):
            name = f"{turn.layer.name}.weight"
            masks[name] = turn.remove(_alone(job.pool_of(name), name), shares[name]).cpu()
    return Found({name: masks[name] for name in job.limits()}, {})


def _shares(job: Job, stages: Sequence[Sequence[LinearLayer]], turns: _Turns) -> dict[str, float]:
    """Return the fraction that each layer loses, by name of the parameter."""
    shares: dict[str, float] = {}
    competing = []
    for pool in job.pools:
        assert pool.sparsity is not None
        shares |= dict.fromkeys(pool.layers, pool.sparsity)
        if pool.config.allocation != "per_layer" and pool.config.pattern() is None:
            competing.append(pool)
    names = {name for pool in competing for name in pool.layers}
    scores: dict[str, Tensor] = {}
    for number, stage in enumerate(stages, 1):
        some = [layer for layer in stage if f"{layer.name}.weight" in names]
        for turn in turns(some, f"Measuring layers {number} of {len(stages)}") if some else ():
            scores[f"{turn.layer.name}.weight"] = turn.scores().cpu()
    for pool in competing:
        assert pool.sparsity is not None
        masks = pool.allocate({name: scores[name] for name in pool.layers}, pool.sparsity)
        shares |= {name: achieved_sparsity({name: mask}, pool.layers) for name, mask in masks.items()}
    return shares


def _alone(pool: Pool, name: str) -> Pool:
    runs = {each: run for each, run in pool.runs.items() if each == name}
    return dataclasses.replace(pool, layers={name: pool.layers[name]}, runs=runs)


def _zeroed(job: Job, name: str, units: Tensor) -> Tensor:
    """Zero what a mask [num_units] removes of a parameter; return the mask in the parameter's shape."""
    parameter = job.model.get_parameter(name)
    mask = job.targets.weights[name].cut.weight_shaped(units)
    if not units.all():
        zeros = parameter.detach().masked_fill(~mask.to(parameter.device), 0.0)
        job.change(name.removesuffix(".weight"), parameter, zeros)
    return mask


@dataclasses.dataclass(frozen=True, eq=False)
class _WandaTurn:
    job: Job
    layer: LinearLayer
    squares: Tensor
    """Sum over tokens of the square of each input, [inputs]."""

    def scores(self) -> Tensor:
        name = f"{self.layer.name}.weight"
        method = self.job.method()
        method.tensors[name] = self.squares
        return method.score(name, self.job.targets.weights[name])

    def remove(self, pool: Pool, sparsity: float) -> Tensor:
        name = f"{self.layer.name}.weight"
        return _zeroed(self.job, name, pool.allocate({name: self.scores()}, sparsity)[name])


def _wanda_turns(job: Job, stage: Sequence[LinearLayer], doing: str) -> list[_WandaTurn]:
    # Layers of one stage read the same: the inputs of one are enough for all.
    squares = job.calibration.squares(_first(stage), doing)[stage[0].name]
    return [_WandaTurn(job, layer, squares.to(layer.parameter.device)) for layer in stage]


@dataclasses.dataclass(frozen=True, eq=False)
class _ObsTurn:
    job: Job
    layer: LinearLayer
    gram: Tensor
    """Sum of x x^T over tokens, [inputs, inputs]."""

    inverse: Tensor
    """``inverse_hessian`` of it."""

    def scores(self) -> Tensor:
        """Return what each unit adds to the relative squared error of the outputs."""
        return self._surgeon().losses() / max(output_energy(self.layer, self.gram), 1e-300)

    def remove(self, pool: Pool, sparsity: float) -> Tensor:
        name = f"{self.layer.name}.weight"
        pattern = pool.config.pattern()
        if pattern is None and pool.config.granularity != "element":
            units = pool.allocate({name: self.scores()}, sparsity)[name]
            mask = self.job.targets.weights[name].cut.weight_shaped(units)
            changed = self._surgeon().without(units)
        else:
            options = self.job.config.method_options()
            assert isinstance(options, ObsOptions)
            changed, keep = sparsegpt(
                self._weight(),
                self.inverse,
                sparsity=None if pattern is not None else sparsity,
                pattern=pattern,
                block_size=options.block_size,
            )
            mask = self.layer.as_stored(keep)
        if not mask.all():
            self.job.change(self.layer.name, self.layer.parameter, self.layer.as_stored(changed))
        return mask

    def _weight(self) -> Tensor:
        return self.layer.weight().to(self.inverse.device)

    def _surgeon(self) -> BlockSurgeon:
        block = self.job.targets.weights[f"{self.layer.name}.weight"].cut.block
        return BlockSurgeon(self._weight(), self.inverse, block)


def _obs_turns(job: Job, stage: Sequence[LinearLayer], doing: str) -> list[_ObsTurn]:
    options = job.config.method_options()
    assert isinstance(options, ObsOptions)
    # Layers of one stage read the same: one matrix is enough for all.
    gram = job.calibration.grams(_first(stage), doing)[stage[0].name]
    inverse = inverse_hessian(gram, options.damping)
    return [_ObsTurn(job, layer, gram, inverse) for layer in stage]


def _first(stage: Sequence[LinearLayer]) -> Mapping[str, LinearLayer]:
    return {stage[0].name: stage[0]}
