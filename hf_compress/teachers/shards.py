"""Files of teacher outputs: written one after the other, mapped into memory and checked when read.

A shard is a safetensors file with ``keys`` [examples, 2], the hashes of its examples, and ``lengths`` [examples], how
many positions each has (0 without token-level outputs), both int64; and for every output the tensors of
``Content.names``, called such as ``logits.values``, one row for each example or, example by example, each position.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_compress.errors import TrainingError
from hf_compress.teachers.manifest import (
    DRAFT,
    MANIFEST,
    Content,
    Manifest,
    Shard,
    leftovers,
    shard_name,
    write_atomically,
)

_BLOCK = 1 << 20


def known_keys(folder: Path, shards: tuple[Shard, ...], content: Content) -> set[bytes]:
    """Return the hashes of all examples in some shards, each as 16 bytes; contents of the files are verified.

    Raises:
        TrainingError: See ``read_shard``.
    """
    found: set[bytes] = set()
    for shard in shards:
        found.update(as_bytes(read_shard(folder, shard, content, verify=True)["keys"]))
    return found


def as_bytes(keys: Tensor) -> list[bytes]:
    """Return each hash of int64 [examples, 2] as 16 bytes."""
    data = keys.cpu().contiguous().numpy().tobytes()
    return [data[at : at + 16] for at in range(0, len(data), 16)]


class ShardWriter:
    """Adds files to a directory; after an interruption it goes on behind the last complete one.

    Leftovers of a process that was killed while it wrote a file are deleted.

    Args:
        folder: An empty directory, or one with an unfinished cache of the same content.
        draft: The manifest with the shards that are complete.
        shard_bytes: Size at which a file is complete.
    """

    def __init__(self, folder: Path, draft: Manifest, shard_bytes: int) -> None:
        self.folder = folder
        self.draft = draft
        self.shard_bytes = shard_bytes
        self._parts: list[dict[str, Tensor]] = []
        self._num_bytes = 0
        for partial in leftovers(folder):
            partial.unlink()

    def add(self, keys: Tensor, lengths: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add examples.

        Args:
            keys: int64, [examples, 2], on the CPU, as all of these.
            lengths: int64, [examples], positions of each.
            outputs: Tensors by name, such as ``logits.values``, in the dtype to store.
        """
        part = {"keys": keys, "lengths": lengths, **outputs}
        self._parts.append(part)
        self._num_bytes += sum(tensor.nbytes for tensor in part.values())
        if self._num_bytes >= self.shard_bytes:
            self._write()

    def finish(self) -> Manifest:
        """Write what is left, then the manifest, which makes the cache whole; one that is there already stays.

        Raises:
            TrainingError: If there are no examples.
        """
        self._write()
        if not self.draft.shards:
            raise TrainingError("teacher cache: there are no training examples. Give a Trainer with a train_dataset.")
        if not (self.folder / MANIFEST).exists():
            self.draft.write(self.folder, MANIFEST)
        (self.folder / DRAFT).unlink(missing_ok=True)
        return self.draft

    def _write(self) -> None:
        if not self._parts:
            return
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        payload = safetensors.torch.save(tensors)
        name = shard_name(len(self.draft.shards))
        write_atomically(self.folder / name, payload)
        sizes = (len(tensors["keys"]), int(tensors["lengths"].sum()), len(payload))
        shard = Shard(name, *sizes, hashlib.sha256(payload).hexdigest())
        self.draft = replace(self.draft, shards=(*self.draft.shards, shard))
        self.draft.write(self.folder, DRAFT)
        self._parts, self._num_bytes = [], 0


def read_shard(folder: Path, shard: Shard, content: Content, *, verify: bool) -> dict[str, Tensor]:
    """Map a file into memory.

    Args:
        folder: The cache.
        shard: What the manifest says about the file.
        content: What it should hold.
        verify: Whether to read all of it and compare its digest; else only its header, hashes and lengths are read.

    Raises:
        TrainingError: If the file is missing, cut off, changed or does not hold what it should.
    """
    path = folder / shard.file
    try:
        if path.stat().st_size != shard.num_bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, the manifest says {shard.num_bytes}")
        if verify and _sha256(path) != shard.sha256:
            raise ValueError("its contents have changed (SHA-256)")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_shard(tensors, shard, content)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: damaged: {error}. Delete the directory and make the cache anew with cache_teacher_outputs."
        ) from error
    return tensors


def _check_shard(tensors: Mapping[str, Tensor], shard: Shard, content: Content) -> None:
    expected = {"keys": ("int64", (shard.num_examples, 2)), "lengths": ("int64", (shard.num_examples,))}
    for output in content.outputs:
        rows = shard.num_positions if output.per_position else shard.num_examples
        for part, (dtype, shape) in content.names(output).items():
            expected[f"{output.name}.{part}"] = (dtype, (rows, *shape))
    found = {name: (str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()}
    if found != expected:
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        name = different[0]
        raise ValueError(f"tensor {name!r} is {found.get(name)}, the manifest says {expected.get(name)}")
    lengths = tensors["lengths"]
    if (lengths < 0).any() or (lengths > shard.num_positions).any() or int(lengths.sum()) != shard.num_positions:
        raise ValueError(f"its lengths do not add up to {shard.num_positions} positions")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
