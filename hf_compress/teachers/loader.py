"""Training data in the order it is stored in, without leaving a trace in the Trainer or in random states."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_compress.errors import ConfigError

_BATCH_SIZE = 8


@contextmanager
def train_dataloader(trainer: Trainer) -> Iterator[Any]:
    """A Trainer's data loader that leaves no trace: neither in random states nor in what accelerate keeps."""
    prepared = list(trainer.accelerator._dataloaders)
    try:
        with same_random_states():
            yield trainer.get_train_dataloader()
    finally:
        trainer.accelerator._dataloaders = prepared


@contextmanager
def same_random_states() -> Iterator[None]:
    """On leaving, give back the states that the global generators had."""
    state, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(arrays)


@contextmanager
def training_batches(data: Any, batch_size: int | None) -> Iterator[Iterable[Any]]:
    """Give every training example once, unshuffled, in batches as the collator makes them.

    Args:
        data: A Trainer, a DataLoader, or batches.
        batch_size: Examples of a batch; None: as the data loader has it.

    Raises:
        ConfigError: If ``data`` is something else.
    """
    if isinstance(data, Trainer):
        with train_dataloader(data) as loader:
            size = batch_size or data.args.train_batch_size
            # Prepared for one of several processes, it would give only a part of the examples.
            yield _in_order(loader, size, num_workers=data.args.dataloader_num_workers)
    elif isinstance(data, DataLoader):
        with same_random_states():
            has_batches = data.batch_size is None and data.batch_sampler is None
            size = batch_size or data.batch_size or _BATCH_SIZE
            yield data if has_batches else _in_order(data, size, num_workers=data.num_workers)
    elif isinstance(data, Iterable) and not isinstance(data, str | Mapping):
        if batch_size is not None:
            raise ConfigError("cache_teacher_outputs: batch_size has no effect on data that comes in batches.")
        with same_random_states():
            yield data
    else:
        raise ConfigError(
            f"cache_teacher_outputs: data is a {type(data).__name__}; allowed: a Trainer, a DataLoader or batches."
        )


def to_device(batch: Any, device: torch.device) -> dict[str, Any]:
    """Return a batch whose tensors are on a device.

    Raises:
        ConfigError: If the batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"cache_teacher_outputs: a batch is a {type(batch).__name__}; allowed: a mapping from names of inputs to "
            "tensors, as collators of Transformers make it."
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _in_order(loader: Any, batch_size: int, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset, batch_size=batch_size, shuffle=False, collate_fn=loader.collate_fn, num_workers=num_workers
    )
