"""What a checkpoint holds of a pruner: masks, scores, thresholds."""

from collections.abc import Mapping

from torch import Tensor

from hf_compress.errors import TrainingError
from hf_compress.instruments.pruner import Pruner


def state_of(pruner: Pruner) -> dict[str, Tensor]:
    """Return masks and the methods' state by name, the same on all ranks; no two share memory."""
    masks = {f"mask.{name}": mask for name, mask in pruner.masks.items()}
    return masks | {f"score.{name}": each.clone() for name, each in scores_of(pruner).items()}


def scores_of(pruner: Pruner) -> dict[str, Tensor]:
    """Return what the methods keep, by layer."""
    return {name: each for pool in pruner.pools for name, each in pool.method.tensors.items()}


def restore(pruner: Pruner, tensors: Mapping[str, Tensor], thresholds: Mapping[str, float], step: int) -> None:
    """Go back to a state.

    Args:
        pruner: Of the same model and config.
        tensors: What ``state_of`` returned, on any device.
        thresholds: Lowest scores kept, by pool.
        step: Optimizer steps done by then.

    Raises:
        TrainingError: If it is the state of other layers.
    """
    masks, scores = _starting(tensors, "mask."), _starting(tensors, "score.")
    different = sorted(masks.keys() ^ pruner.masks.keys())
    different += [name for name in masks.keys() & pruner.masks.keys() if masks[name].shape != pruner.masks[name].shape]
    if different:
        raise TrainingError(
            f"PruningCallback: the checkpoint's masks belong to other groups (first difference: {different[0]!r}); "
            "resume with the model that the checkpoint was written for."
        )
    fresh = scores_of(pruner)
    strange = sorted(name for name in scores if name.partition("/")[0] not in pruner.masks)
    strange += [name for name in scores.keys() & fresh.keys() if scores[name].shape != fresh[name].shape]
    if strange:
        raise TrainingError(
            f"PruningCallback: the checkpoint's scores belong to other groups or criteria (first: {strange[0]!r}); "
            "resume with the model and the config that the checkpoint was written for."
        )
    pruner.thresholds = dict(thresholds)
    pruner.unread.clear()
    device = next(pruner.model.parameters()).device
    for pool in pruner.pools:
        mine = {name: each for name, each in scores.items() if name.partition("/")[0] in pool.layers}
        pool.method.tensors = {name: each.to(device, copy=True) for name, each in mine.items()}
    for pool, name in pruner.each():
        pruner.masks[name] = masks[name].cpu().bool()
        pruner.units[name].set_mask(pruner.masks[name])
        pruner.set_time(pool, step + 1)
        pruner.show(pool, name)


def _starting(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
