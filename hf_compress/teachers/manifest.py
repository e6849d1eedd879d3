"""What a cache of teacher outputs says about itself: ``teacher_outputs.json``, written last and checked on reading."""

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_compress.errors import TrainingError
from hf_compress.reading import read_json
from hf_compress.teachers.inputs import InputSpec

MANIFEST = "teacher_outputs.json"
DRAFT = "teacher_outputs.unfinished.json"
"""The manifest of a cache that is being written: of the shards that are complete."""

SCHEMA_VERSION = 2
DTYPES = ("float32", "float16", "bfloat16")
MAX_BYTES = 1 << 26
_MAX_SIZE = 1 << 50
_SHARD_NAME = re.compile(r"outputs-\d{5,9}\.safetensors")
_LEFTOVER = re.compile(rf"({_SHARD_NAME.pattern}|{re.escape(MANIFEST)}|{re.escape(DRAFT)})\.\d+\.tmp")
_MASKS = ("", "decoder_attention_mask", "labels", "decoder_input_ids")


@dataclass(frozen=True)
class OutputSpec:
    """One output of the teacher, such as ``logits``."""

    name: str
    """Key of the teacher's ModelOutput."""

    per_position: bool
    """Whether there is one for every position that counts, or one for every example."""

    shape: tuple[int, ...]
    """Of one of them; the last dimension is that of the classes, if there is any."""


@dataclass(frozen=True)
class Shard:
    """One file of outputs."""

    file: str
    num_examples: int
    num_positions: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """What outputs are stored, and for what inputs; caches of the same content may be exchanged."""

    teacher_digest: str
    """See ``model_digest``."""

    inputs: InputSpec
    outputs: tuple[OutputSpec, ...]
    dtype: str
    """Of stored values, one of ``DTYPES``."""

    computed_in: str
    """What autocast computed in, such as ``bfloat16``; empty without autocast."""

    top_k: int | None
    """Number of classes stored of each output, those with the largest logits; None: all."""

    temperatures: tuple[float, ...]
    """At which the rest of the classes is summed up, if ``top_k``."""

    def names(self, output: OutputSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the tensors that hold one output: by part, dtype and shape without the first dimension."""
        if self.top_k is None:
            return {"values": (self.dtype, output.shape)}
        leading = output.shape[:-1]
        return {
            "values": (self.dtype, (*leading, self.top_k)),
            "indices": ("int32", (*leading, self.top_k)),
            "log_rest": ("float32", (*leading, len(self.temperatures))),
        }


@dataclass(frozen=True)
class Manifest:
    """All that is known of a cache."""

    schema_version: int
    content: Content
    shards: tuple[Shard, ...]
    teacher: Mapping[str, Any]
    """Its ``class`` and ``config``, to compare labels and vocabulary with a student's."""

    versions: Mapping[str, Any]
    """Packages that wrote it, for the record."""

    def write(self, folder: Path, name: str) -> None:
        """Write the file; whoever reads meanwhile sees all of it or nothing."""
        document = dataclasses.asdict(self)
        document["digest"] = _digest(document)
        write_atomically(folder / name, json.dumps(document, indent=1).encode())


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read and check the manifest of a cache.

    Args:
        folder: The cache.
        name: ``MANIFEST`` or ``DRAFT``.

    Raises:
        TrainingError: If there is none, or it is damaged or of another version.
    """
    path = folder / name
    if not path.is_file():
        unfinished = " It holds an unfinished one." if (folder / DRAFT).is_file() else ""
        raise TrainingError(
            f"{folder}: no cache of teacher outputs, {name} is missing.{unfinished} Call cache_teacher_outputs with "
            "this directory, which goes on where it was interrupted."
        )
    try:
        document = read_json(path, MAX_BYTES)
        _require(isinstance(document, dict), "no object")
        version = document.get("schema_version")
        _require(version == SCHEMA_VERSION, f"schema_version is {version!r}, allowed: {SCHEMA_VERSION}")
        _require(document.pop("digest", None) == _digest(document), "its digest does not match its contents")
        manifest: Manifest = _parsed(Manifest, document, "manifest")
        _check(manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path}: this is no manifest that this version of hf-compress can use: {error}. Delete the directory and "
            "make the cache anew with cache_teacher_outputs, or use the version that wrote it."
        ) from error
    return manifest


def shard_name(number: int) -> str:
    """Return the name of the file with this number."""
    return f"outputs-{number:05d}.safetensors"


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file so that a process killed meanwhile leaves the old one or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with partial.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def leftovers(folder: Path) -> list[Path]:
    """Return the files that processes killed while writing have left in a directory."""
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name))


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _check(manifest: Manifest) -> None:
    """Check what types do not say; names of files first, so that nothing outside the directory is ever opened."""
    content, shards = manifest.content, manifest.shards
    for shard in shards:
        _require(_SHARD_NAME.fullmatch(shard.file) is not None, f"{shard.file!r} is no name of a file of outputs")
        sizes = (shard.num_examples, shard.num_positions, shard.num_bytes)
        _require(all(0 <= size <= _MAX_SIZE for size in sizes), f"{shard.file}: impossible sizes")
    _require(len({shard.file for shard in shards}) == len(shards), "it lists a file twice")
    _require(bool(content.outputs) and bool(content.inputs.hashed), "it has no outputs or no inputs")
    _require(content.dtype in DTYPES, f"dtype is {content.dtype!r}; allowed: {', '.join(DTYPES)}")
    _require(content.inputs.decoder_mask in _MASKS, f"decoder_mask is {content.inputs.decoder_mask!r}")
    _require(set(content.inputs.padded) <= set(content.inputs.hashed), "it has padded inputs that are not hashed")
    for output in content.outputs:
        _require(all(size > 0 for size in output.shape), f"{output.name}: sizes must be at least 1")
        fits = content.top_k is None or (bool(output.shape) and 0 < content.top_k < output.shape[-1])
        _require(fits, f"{output.name}: top_k={content.top_k} of shape {list(output.shape)}")
    facts = {"class": str, "config": dict}
    for name, kind in facts.items():
        given = manifest.teacher.get(name)
        _require(type(given) is kind, f"teacher.{name} must be of type {kind.__name__}, not {type(given).__name__}")
    good = all(0 < each < math.inf for each in content.temperatures)
    _require(good and bool(content.temperatures) == (content.top_k is not None), "temperatures do not fit top_k")


def _parsed(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the type that a field is declared with.

    Raises:
        ValueError: If it is of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _require(isinstance(value, dict) and set(value) == set(hints), f"{where} must have exactly {sorted(hints)}")
        parts = {name: _parsed(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
        return typing.cast(Any, kind)(**parts)
    if origin is tuple:
        _require(isinstance(value, list), f"{where} must be a list")
        return tuple(_parsed(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is types.UnionType:
        return None if value is None else _parsed(arguments[0], value, where)
    allowed = dict if origin is not None else kind
    _require(type(value) is allowed, f"{where} must be of type {allowed.__name__}, not {type(value).__name__}")
    return value
