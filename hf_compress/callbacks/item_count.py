"""Whether a task loss is a sum divided by ``num_items_in_batch``, or a mean over its own micro-batch.

Only its computation knows, and the distillation loss has to follow it, or gradient accumulation would weigh both
terms differently. So the first micro-batch is asked.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_compress.errors import TrainingError

_READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__bool__}


class CountProbe(Tensor):
    """A ``num_items_in_batch`` that shows by its gradient whether a loss depends on it.

    It also notices when it, or what is computed from it, is read as a Python number, which no gradient passes.
    """

    reads: list[str]

    @classmethod
    def of(cls, num_items: Any, device: torch.device) -> "CountProbe":
        """Return a probe, [], float32."""
        probe: Any = torch.as_tensor(num_items, device=device).float().clone().as_subclass(cls).requires_grad_()
        probe.reads = []
        found: CountProbe = probe
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what a tensor does; notice reads, and hand the list of them on to the result."""
        source = next((each for each in args if isinstance(each, CountProbe)), None)
        reads = vars(source).get("reads") if source is not None else None
        if func in _READS and reads is not None:
            reads.append(func.__name__)
        result: Any = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(result, CountProbe) and reads is not None:
            vars(result).setdefault("reads", reads)
        return result


def gradient_says(loss: Tensor, probe: Tensor) -> bool:
    """Return whether a loss depends on the probe that it was computed with.

    Raises:
        TrainingError: If it does not, but read it as a number, so that nobody can say.
    """
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, probe, retain_graph=True, allow_unused=True)
    reads = probe.reads if isinstance(probe, CountProbe) else []
    if gradient is None and reads:
        raise TrainingError(
            f"distillation: the model's forward reads num_items_in_batch as a number ({reads[0]}), so whether its loss "
            "is divided by it cannot be found out. Let it compute with the tensor (loss / num_items_in_batch), or "
            "compute the loss in Trainer(compute_loss_func=...)."
        )
    return gradient is not None


def loss_of_twice_as_many(
    compute: Callable[..., Tensor], outputs: Any, labels: Any, kwargs: Mapping[str, Any], device: torch.device
) -> Tensor:
    """Return the loss with ``num_items_in_batch`` doubled; whatever ``compute`` does to its arguments, to copies."""
    copies = tree_map(_copy, (outputs, labels, dict(kwargs)))
    outputs, labels, given = copies
    given["num_items_in_batch"] = 2 * given["num_items_in_batch"]
    forked = [] if device.type == "cpu" else [device]
    # What it draws, the call that counts must draw again: else noise would look like a dependence on the count.
    state, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(forked, device_type="cuda" if device.type == "cpu" else device.type):
            return compute(outputs, labels, **given).detach()
    finally:
        random.setstate(state)
        numpy.random.set_state(arrays)


def _copy(value: Any) -> Any:
    """Return a copy that may be differentiated if the original may be."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def values_say(loss: Tensor, of_twice_as_many: Tensor) -> bool | None:
    """Return whether a loss depends on ``num_items_in_batch``; None where it is 0 or no number, and nobody can say."""
    values = torch.stack([loss.detach().float().reshape(()), of_twice_as_many.float().reshape(())]).tolist()
    if not 0 < abs(values[0]) < float("inf"):
        return None
    return bool(abs(values[0] - values[1]) > 1e-3 * abs(values[0]))
