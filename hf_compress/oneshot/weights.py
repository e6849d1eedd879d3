"""Single weights of linear layers: chosen, set to zero, and with ``obs`` made up for by the others."""

from torch import Tensor

from hf_compress.config import WEIGHTS
from hf_compress.errors import TargetError
from hf_compress.oneshot.linear import LinearLayer
from hf_compress.oneshot.request import Found, Job
from hf_compress.oneshot.scores import input_norms
from hf_compress.pruning.criteria.oneshot import ObsOptions
from hf_compress.pruning.obs import inverse_hessian, keep_best_of_each, sparsegpt


def remove_small(job: Job) -> Found:
    """Remove the smallest weights: of all layers together, of each layer, or of every n:m neighbours."""
    layers = job.layers()
    scores = {name: layer.weight().abs() for name, layer in layers.items()}
    pattern = _pattern(job, layers)
    if pattern is not None:
        masks = {name: keep_best_of_each(values, pattern) for name, values in scores.items()}
    else:
        masks = job.allocate_weights(scores)
    for name, layer in layers.items():
        _zero(job, layer, masks[name])
    return _found(masks, layers)


def remove_by_inputs(job: Job) -> Found:
    """Remove weights by ``|W_ij| * ||x_j||_2``, compared within each output: Wanda.

    Source: Sun et al. 2023, arXiv:2306.11695, algorithm 1.
    """
    layers = job.layers()
    pattern = _pattern(job, layers)
    stages = job.calibration.stages(layers)
    masks: dict[str, Tensor] = {}
    for stage in stages:
        # Layers of one stage read the same; what reaches them is what pruned layers before them give.
        norms = input_norms(job, {stage[0]: layers[stage[0]]})[stage[0]]
        for name in stage:
            weight = layers[name].weight()
            kept = weight.shape[1] - round(job.sparsity(WEIGHTS) * weight.shape[1])
            # Rows as a whole are one more pattern: keep so many of all inputs.
            masks[name] = keep_best_of_each(
                weight.abs().double() * norms.to(weight.device), pattern or (kept, weight.shape[1])
            )
            _zero(job, layers[name], masks[name])
    return _found(masks, layers)


def remove_and_update(job: Job) -> Found:
    """Remove weights layer by layer, and update the others to make up for them: SparseGPT.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    options = job.config.method_options()
    assert isinstance(options, ObsOptions)
    layers = job.layers()
    pattern = _pattern(job, layers)
    sparsity = None if pattern is not None else job.sparsity(WEIGHTS)
    stages = job.calibration.stages(layers)
    masks: dict[str, Tensor] = {}
    for number, stage in enumerate(stages, 1):
        # Layers of one stage read the same: one matrix is enough for all.
        first = {stage[0]: layers[stage[0]]}
        gram = job.calibration.grams(first, f"Pruning layers {number} of {len(stages)}")[stage[0]]
        inverse = inverse_hessian(gram, options.damping)
        for name in stage:
            weight = layers[name].weight().to(inverse.device)
            changed, masks[name] = sparsegpt(
                weight, inverse, sparsity=sparsity, pattern=pattern, block_size=options.block_size
            )
            job.change(layers[name], changed)
    return _found(masks, layers)


def _pattern(job: Job, layers: dict[str, LinearLayer]) -> tuple[int, int] | None:
    pattern = job.config.pattern()
    if pattern is not None:
        unfit = next((n for n, layer in layers.items() if layer.weight().shape[1] % pattern[1]), None)
        if unfit is not None:
            raise TargetError(
                f"prune_oneshot: {unfit!r} has {layers[unfit].weight().shape[1]} inputs, no multiple of {pattern[1]}, "
                f"which the pattern {pattern[0]}:{pattern[1]} needs. Exclude it."
            )
    return pattern


def _zero(job: Job, layer: LinearLayer, mask: Tensor) -> None:
    weight = layer.weight()
    job.change(layer, weight.masked_fill(~mask.to(weight.device), 0.0))


def _found(masks: dict[str, Tensor], layers: dict[str, LinearLayer]) -> Found:
    return Found({f"{name}.weight": layer.as_stored(masks[name]).cpu() for name, layer in layers.items()}, {})
