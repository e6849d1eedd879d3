"""Several processes (ranks) train one model: what they have to do together, and what is refused."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_compress.errors import TrainingError

logger = logging.get_logger(__name__)

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers say how many processes there are."""


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks; the tensor itself in a single process.

    Every rank must call it, with the same shape.
    """
    if num_ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / num_ranks()


def elementwise(tensor: Tensor, operation: str) -> Tensor:
    """Return the elementwise ``"min"``, ``"max"`` or ``"sum"`` of a tensor over all ranks.

    Every rank must call it, with the same shape.
    """
    joined = tensor.clone()
    if num_ranks() > 1:
        operations = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}
        dist.all_reduce(joined, op=operations[operation])
    return joined


def mean_gradients(gradients: Mapping[str, Tensor | None], like: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return every gradient's mean over all ranks, in a single exchange.

    A rank whose batch did not reach a tensor contributes zeros, as in DDP.

    Args:
        gradients: By name; None where there is none on this rank.
        like: Tensors of the same names and shapes.

    Returns:
        The means by name; None where no rank has a gradient.
    """
    if num_ranks() == 1 or not like:
        return dict(gradients)
    there = [gradients[name] is not None for name in like]
    found = [gradients[name] for name in like]
    parts = [torch.zeros_like(each) if got is None else got for each, got in zip(like.values(), found, strict=True)]
    flags = parts[0].new_tensor(there)
    flat = all_reduce_mean(torch.cat([flags, *(part.flatten() for part in parts)]))
    reached = flat[: len(flags)].tolist()
    means = flat[len(flags) :].split([part.numel() for part in parts])  # type: ignore[no-untyped-call]
    shaped = (mean.view_as(part) for mean, part in zip(means, parts, strict=True))
    return {name: mean if share > 0 else None for name, mean, share in zip(like, shaped, reached, strict=True)}


def check_same_on_all_ranks(values: Mapping[str, Tensor | str], what: str, device: torch.device) -> None:
    """Check that all ranks hold the same values; every rank must call it.

    Args:
        values: By name; as many on every rank.
        what: What they are, in the plural, for the message.
        device: Where tensors are exchanged.

    Raises:
        TrainingError: On every rank, if they differ; it names the first that does.
    """
    if num_ranks() == 1:
        return
    digests = torch.tensor([_digest(value) for value in values.values()], dtype=torch.int64, device=device)
    extremes = torch.cat([digests, -digests])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    high, negative_low = extremes.tolist()[: len(digests)], extremes.tolist()[len(digests) :]
    for name, a, b in zip(values, high, negative_low, strict=True):
        if a != -b:
            raise TrainingError(
                f"{what} differ between the {num_ranks()} processes (first difference: {name!r}), which would from now "
                "on train different models. Give all of them the same config, model and seed; if they have, their "
                "weights have drifted apart, which unequal devices or a changed model can cause."
            )


@contextmanager
def fail_together(device: torch.device) -> Iterator[None]:
    """Let an error on one rank be an error on all: the others would wait for it in their next exchange.

    Raises:
        TrainingError: On the ranks that had no error of their own.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 (raised again below)
        error = caught
    if num_ranks() > 1:
        failed = torch.zeros(num_ranks(), dtype=torch.int64, device=device)
        failed[dist.get_rank()] = int(error is not None)
        dist.all_reduce(failed)
        if error is None and failed.any():
            where = ", ".join(str(rank) for rank in failed.nonzero().flatten().tolist())
            raise TrainingError(f"the process of rank {where} failed; its own message says why.")
    if error is not None:
        raise error


def check_parallelism(trainer: Trainer) -> None:
    """Check that ranks share the model in a way in which averages over ranks mean what they should.

    Raises:
        TrainingError: For tensor, context and sequence parallelism, weights offloaded by FSDP, and sharding other
            than the Trainer's own.
    """
    model: Any = trainer.model
    config = getattr(trainer.accelerator, "parallelism_config", None)
    remedy = "Use DDP or FSDP version 2, in which every process has data of its own."
    sizes = {
        "tp_size (tensor parallelism)": max(getattr(model, "tp_size", 1) or 1, getattr(config, "tp_size", 1) or 1),
        "cp_size (context parallelism)": getattr(config, "cp_size", 1) or 1,
        "sp_size (sequence parallelism)": getattr(config, "sp_size", 1) or 1,
    }
    for name, size in sizes.items():
        if size > 1:
            raise TrainingError(f"{name} is {size}: several processes work on the same batch. {remedy}")
    if any(getattr(each, "is_distributed_loading_by_transformers", False) for each in (trainer, model)):
        raise TrainingError(f"the model was sharded by from_pretrained(distributed_config=...). {remedy}")
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    sharded = next((name for name, each in model.named_parameters() if isinstance(each, DTensor)), None)
    if sharded is not None and fsdp is None:
        raise TrainingError(f"parameter {sharded!r} is a DTensor, but the Trainer does not run FSDP. {remedy}")
    if isinstance(getattr(fsdp, "cpu_offload", None), CPUOffloadPolicy):
        raise TrainingError("FSDP keeps the weights on the CPU, away from their gates. Set offload_params to false.")


def check_launched(args: TrainingArguments) -> None:
    """Check that the Trainer counts the processes that a launcher says it started.

    Without ``use_cpu`` it starts no process group on CPUs, and every process would take itself for the first.

    Raises:
        TrainingError: If ``WORLD_SIZE`` is more than 1 and the Trainer knows of one process.
    """
    given = os.environ.get(_SIZES[0], "1")
    if args.world_size == 1 and given.isdecimal() and int(given) > 1:
        raise TrainingError(
            f"{_SIZES[0]} is {given} in the environment: a launcher started {given} processes. But "
            "TrainingArguments.world_size is 1: each would train alone and write the same files as the others. On CPUs "
            "pass TrainingArguments(use_cpu=True). On GPUs start the processes with torchrun --nproc_per_node N, at "
            f"most one per GPU. If one process is all there is to be, unset {_SIZES[0]}."
        )


def warn_of_lost_processes() -> None:
    """Warn if ``accelerate launch`` was asked for several processes and started a single one.

    So it does with ``--cpu``, or without a GPU and ``--multi_gpu``. It leaves its own variables and an address to meet
    at in the environment, and nobody to meet there.
    """
    if num_ranks() > 1 or any(name in os.environ for name in _SIZES):
        return
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        logger.warning(
            "hf_compress: a single process is training, although `accelerate launch` seems to have been told to start "
            "several: on CPUs it starts one, unless it is called as `accelerate launch --multi_gpu --num_processes N`. "
            "`torchrun --nproc_per_node N` works, too."
        )


def on_first_rank(function: Callable[[], Any]) -> Any:
    """Call a function on the first rank alone and return on all what it returned there; every rank must call it.

    Raises:
        TrainingError: On the other ranks, if it failed.
    """
    if num_ranks() == 1:
        return function()
    found: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            found = [function(), None]
        except Exception as caught:  # noqa: BLE001 (raised again below)
            error, found = caught, [None, repr(caught)]
    dist.broadcast_object_list(found, src=0)
    if error is not None:
        raise error
    if found[1] is not None:
        raise TrainingError(f"the process of rank 0 failed: {found[1]}")
    return found[0]


def fingerprint(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Return a short text that differs if a name, a value or a fact does."""
    return json.dumps([{name: _digest(tensor) for name, tensor in tensors.items()}, dict(facts)], sort_keys=True)


def _digest(value: Tensor | str) -> int:
    raw = value.encode() if isinstance(value, str) else value.detach().cpu().contiguous().numpy().tobytes()
    # Seven bytes: the negative number fits an int64 too.
    return int.from_bytes(hashlib.sha256(raw).digest()[:7], "little")
