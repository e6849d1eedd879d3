"""What a checkpoint holds for the compression callbacks: one safetensors file and one JSON file.

``hf_compress_state.safetensors`` has every section's tensors as ``"<section>.<name>"``;
``hf_compress_state.json`` has the rest and the digests that tie both to the checkpoint around them. The JSON file
is written last, so a process killed at any moment leaves either a complete state or one that is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from hf_compress.config import SCHEMA_VERSION
from hf_compress.errors import TrainingError

TENSOR_FILE = "hf_compress_state.safetensors"
JSON_FILE = "hf_compress_state.json"

_BLOCK = 1 << 16
_MAX_BLOCKS = 256


@dataclass(frozen=True)
class Section:
    """What one callback stores."""

    config: Mapping[str, Any]
    """``Config.to_dict()`` of the callback."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> tensor, any shape and dtype; read back on the CPU."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold."""


def write_state(folder: Path, global_step: int, sections: Mapping[str, Section]) -> None:
    """Add the state to a checkpoint whose other files are written already.

    Args:
        folder: The checkpoint folder.
        global_step: Optimizer steps done so far.
        sections: Section name -> what to store.
    """
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, section in sections.items()
        for key, tensor in section.tensors.items()
    }
    payload = safetensors.torch.save(tensors)
    _write_atomically(folder / TENSOR_FILE, payload)
    document = {
        "schema_version": SCHEMA_VERSION,
        "global_step": global_step,
        "sections": {
            name: {"config": section.config, "facts": section.facts, "tensors": sorted(section.tensors)}
            for name, section in sections.items()
        },
        "sha256": hashlib.sha256(payload).hexdigest(),
        "checkpoint": _fingerprints(folder),
    }
    _write_atomically(folder / JSON_FILE, json.dumps(document, indent=2).encode())


def read_state(folder: Path, global_step: int | None = None) -> dict[str, Section]:
    """Read the state of a checkpoint.

    Args:
        folder: The checkpoint folder.
        global_step: The step that the checkpoint must have been written at, or None to accept any.

    Returns:
        Section name -> what was stored.

    Raises:
        TrainingError: If the state is missing, damaged, of another version or step, or belongs to a checkpoint
            with other contents than the folder has now.
    """
    document, payload = _read_files(folder)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise TrainingError(
            f"{folder / JSON_FILE}: schema_version is {document.get('schema_version')!r}; this version of "
            f"hf-compress reads {SCHEMA_VERSION}. Resume with the version that wrote it."
        )
    if global_step is not None and document.get("global_step") != global_step:
        raise TrainingError(
            f"{folder / JSON_FILE}: written at step {document.get('global_step')!r}, but training resumes at step "
            f"{global_step}. {_remedy(folder)}"
        )
    if document.get("sha256") != hashlib.sha256(payload).hexdigest():
        raise TrainingError(f"{folder / TENSOR_FILE}: its sha256 is not the one in {JSON_FILE}. {_remedy(folder)}")
    tensors = safetensors.torch.load(payload)
    try:
        _check_fingerprints(folder, document["checkpoint"])
        return {
            name: Section(
                config=section["config"],
                tensors={key: tensors[f"{name}.{key}"] for key in section["tensors"]},
                facts=section["facts"],
            )
            for name, section in document["sections"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{folder / JSON_FILE}: incomplete ({error!r}). {_remedy(folder)}") from error


def check_config(folder: Path, section: str, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a callback resumes with the config it was stored with.

    Raises:
        TrainingError: If not; the message lists every field that differs.
    """
    current = json.loads(json.dumps(current))
    differences = [
        f"{key}: {stored.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted({*stored, *current})
        if stored.get(key) != current.get(key)
    ]
    if differences:
        raise TrainingError(
            f"{folder}: the {section} config differs from the one it was saved with ({'; '.join(differences)}). "
            "Resume with the same config, or start a new run from the checkpoint's weights."
        )


def _read_files(folder: Path) -> tuple[dict[str, Any], bytes]:
    try:
        document = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        payload = (folder / TENSOR_FILE).read_bytes()
    except FileNotFoundError as error:
        raise TrainingError(
            f"{folder}: no {Path(error.filename).name}. The checkpoint was made without compression callbacks, or "
            f"the process died while writing it. {_remedy(folder)}"
        ) from error
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / JSON_FILE}: cannot be read: {error}. {_remedy(folder)}") from error
    if not isinstance(document, dict):
        raise TrainingError(f"{folder / JSON_FILE}: not a JSON object. {_remedy(folder)}")
    return document, payload


def _remedy(folder: Path) -> str:
    others = sorted(path.parent.name for path in folder.parent.glob(f"checkpoint-*/{JSON_FILE}"))
    complete = ", ".join(name for name in others if name != folder.name)
    found = f"resume from a complete checkpoint ({complete})" if complete else "no other checkpoint there is complete"
    return f"What to do: {found}, or start a new run."


def _write_atomically(path: Path, payload: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _fingerprints(folder: Path) -> dict[str, str]:
    """Digests of the checkpoint's own files: a rerun killed while overwriting the folder must not fit old state."""
    names = {TRAINER_STATE_NAME, *(path.name for path in folder.glob("*.safetensors"))} - {TENSOR_FILE}
    return {name: _fingerprint(folder / name) for name in sorted(names) if (folder / name).is_file()}


def _check_fingerprints(folder: Path, stored: Mapping[str, str]) -> None:
    present = _fingerprints(folder)
    changed = sorted(name for name, digest in stored.items() if present.get(name) != digest)
    if changed:
        raise TrainingError(
            f"{folder}: {', '.join(changed)} changed after {JSON_FILE} was written, as when another run is killed "
            f"while it overwrites the folder. {_remedy(folder)}"
        )


def _fingerprint(path: Path) -> str:
    """Digest of the size and of at most 16 MiB in evenly spaced blocks: whole small files, a sample of large ones."""
    size = path.stat().st_size
    num_blocks = min(_MAX_BLOCKS, max(1, -(-size // _BLOCK)))
    last_start = max(0, size - _BLOCK)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(num_blocks):
            file.seek(0 if num_blocks == 1 else index * last_start // (num_blocks - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
