"""What a checkpoint holds for the compression callbacks: one safetensors file and one JSON file.

``hf_compress_state.safetensors`` has every section's tensors as ``"<section>.<name>"``;
``hf_compress_state.json`` has the rest, and digests of itself, of the tensors and of the checkpoint around them. The
JSON file is written last, so a process killed at any moment leaves either a complete state or one that is refused.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from hf_compress.config import SCHEMA_VERSION
from hf_compress.errors import TrainingError
from hf_compress.reading import read_json

TENSOR_FILE = "hf_compress_state.safetensors"
JSON_FILE = "hf_compress_state.json"

_BLOCK = 1 << 16
_MAX_BLOCKS = 256

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ON_HUB = "last-checkpoint"
"""Folder of the newest checkpoint in a repository, with ``hub_strategy="checkpoint"``."""

_READ_ON_RESUME = {".safetensors", ".bin", ".pt", ".pth", ".distcp"}
"""Suffixes of the weights, optimizer, scheduler, scaler and random states that a resumed run reads."""


@dataclass(frozen=True)
class Section:
    """What one callback stores."""

    config: Mapping[str, Any]
    """``Config.to_dict()`` of the callback."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> tensor, any shape and dtype; read back on the CPU."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold."""


def write_state(
    folder: Path, global_step: int, sections: Mapping[str, Section], unfinished: Collection[str] = ()
) -> None:
    """Add the state to a checkpoint whose other files are written already.

    Args:
        folder: The checkpoint folder.
        global_step: Optimizer steps done so far.
        sections: Section name -> what to store.
        unfinished: Names of files that other processes may still be writing; they get no digest.
    """
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, section in sections.items()
        for key, tensor in section.tensors.items()
    }
    payload = safetensors.torch.save(tensors)
    _write_atomically(folder / TENSOR_FILE, payload)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "global_step": global_step,
        "sections": {
            name: {"config": section.config, "facts": section.facts, "tensors": sorted(section.tensors)}
            for name, section in sections.items()
        },
        "sha256": hashlib.sha256(payload).hexdigest(),
        "checkpoint": {name: digest for name, digest in _fingerprints(folder) if name not in unfinished},
    }
    document["digest"] = digest_of(document)
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
    try:
        return _read_state(folder, global_step)
    except TrainingError as error:
        raise TrainingError(f"{error} {_remedy(folder)}") from error.__cause__


def digest_of(document: Mapping[str, Any]) -> str:
    """Return a digest of the contents of the JSON file, but for its own."""
    parsed = json.loads(json.dumps({name: value for name, value in document.items() if name != "digest"}))
    return hashlib.sha256(json.dumps(parsed, sort_keys=True).encode()).hexdigest()


def check_moments(who: str, what: str, stored: Any, current: list[int]) -> None:
    """Check that fractions of the run are the same steps as when the checkpoint was written.

    Raises:
        TrainingError: If not, as when the number of steps was changed.
    """
    if stored != current:
        raise TrainingError(
            f"{who}: {what} begins and ends at steps {stored} in the checkpoint, {current} now: fractions of a run "
            "whose number of steps changed. Resume with the same max_steps or num_train_epochs, batch size and number "
            "of processes, or start a new run from the checkpoint's weights; moments given in steps (int) stay."
        )


def check_resumable(folder: Path) -> None:
    """Check that a checkpoint holds what the Trainer needs besides weights; it would go on without, in silence.

    Raises:
        TrainingError: If it has no optimizer.
    """
    if not any(folder.glob("optimizer*")):
        raise TrainingError(
            f"{folder}: holds no optimizer state, as with save_only_model=True, so the run cannot go on where it was. "
            "Train with save_only_model=False to resume, or start a new run from the checkpoint's weights."
        )


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint that a run with compression callbacks can resume from.

    A process killed while it saves leaves a checkpoint that cannot be resumed from, and Transformers would choose it
    as the newest. This passes it over. In a repository that was downloaded from the Hub, ``last-checkpoint`` counts as
    well::

        trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))

    Nothing is changed or deleted. A checkpoint that is passed over draws a warning.

    Args:
        output_dir: ``TrainingArguments.output_dir``; it need not exist.

    Returns:
        The checkpoint's folder, or None if there is none, which makes ``train`` start from the beginning.
    """
    for folder in _checkpoints(Path(output_dir)):
        reason = _why_not_resumable(folder)
        if reason is None:
            return str(folder)
        warnings.warn(f"{folder} is passed over: {reason}", stacklevel=2)
    return None


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


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders that are called like checkpoints, newest first."""
    try:
        steps = {path: _step_of(path) for path in output_dir.iterdir() if path.is_dir()}
    except OSError:
        return []
    found = {path: step for path, step in steps.items() if step is not None}
    return sorted(found, key=lambda path: (found[path], path.name != _ON_HUB), reverse=True)


def _step_of(folder: Path) -> int | None:
    """Return the step of a folder that is called like a checkpoint; -1 if it does not say."""
    match = _CHECKPOINT.fullmatch(folder.name)
    if match or folder.name != _ON_HUB:
        return int(match[1]) if match else None
    try:
        step = _read_files(folder)[0].get("global_step")
    except TrainingError:
        return -1
    return step if isinstance(step, int) else -1


def _why_not_resumable(folder: Path) -> str | None:
    step = _CHECKPOINT.fullmatch(folder.name)
    try:
        _read_state(folder, int(step[1]) if step else None)
        check_resumable(folder)
    except (TrainingError, OSError) as error:
        return str(error)
    return None


def _read_state(folder: Path, global_step: int | None) -> dict[str, Section]:
    """Do the work of ``read_state``, whose errors add what else there is to resume from."""
    document, payload = _read_files(folder)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise TrainingError(
            f"{folder / JSON_FILE}: schema_version is {document.get('schema_version')!r}; this version of "
            f"hf-compress reads {SCHEMA_VERSION}. Resume with the version that wrote it."
        )
    if document.get("digest") != digest_of(document):
        raise TrainingError(
            f"{folder / JSON_FILE}: its contents are not those that were written: its digest is "
            f"{'another' if 'digest' in document else 'missing'}. The file was edited or damaged; restore it."
        )
    if global_step is not None and document.get("global_step") != global_step:
        raise TrainingError(
            f"{folder / JSON_FILE}: written at step {document.get('global_step')!r}, but training resumes at step "
            f"{global_step}."
        )
    if document.get("sha256") != hashlib.sha256(payload).hexdigest():
        raise TrainingError(f"{folder / TENSOR_FILE}: its sha256 is not the one in {JSON_FILE}.")
    try:
        _check_fingerprints(folder, document["checkpoint"])
        tensors = safetensors.torch.load(payload)
        return {
            name: Section(
                config=section["config"],
                tensors={key: tensors[f"{name}.{key}"] for key in section["tensors"]},
                facts=section["facts"],
            )
            for name, section in document["sections"].items()
        }
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"{folder / JSON_FILE}: incomplete ({error!r}).") from error


def _read_files(folder: Path) -> tuple[dict[str, Any], bytes]:
    try:
        document = read_json(folder / JSON_FILE)
        payload = (folder / TENSOR_FILE).read_bytes()
    except FileNotFoundError as error:
        raise TrainingError(
            f"{folder}: no {Path(error.filename).name}. The checkpoint was made without compression callbacks, or "
            "the process died while writing it."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{folder / JSON_FILE}: cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise TrainingError(f"{folder / JSON_FILE}: not a JSON object.")
    return document, payload


def _remedy(folder: Path) -> str:
    others = [path for path in _checkpoints(folder.parent) if path.name != folder.name]
    complete = ", ".join(path.name for path in others if _why_not_resumable(path) is None)
    if not complete:
        return "What to do: start a new run; no other checkpoint there is complete."
    return (
        f"What to do: resume from a complete checkpoint ({complete}), such as "
        "resume_from_checkpoint=hf_compress.last_complete_checkpoint(output_dir), or start a new run."
    )


def _write_atomically(path: Path, payload: bytes) -> None:
    # Always the same name: what a killed process left of it is overwritten and renamed, and never uploaded.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _fingerprints(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield names and digests of the files that a resumed run reads.

    A rerun killed while overwriting the folder must not fit the old state, nor an old optimizer new weights.
    """
    for path in sorted(folder.rglob("*")):
        if _is_read_on_resume(path) and path.name != TENSOR_FILE and path.is_file():
            yield path.relative_to(folder).as_posix(), _fingerprint(path)


def _is_read_on_resume(path: Path) -> bool:
    special = path.name in (TRAINER_STATE_NAME, ".metadata") or path.name.endswith(".index.json")
    return special or path.suffix in _READ_ON_RESUME


def _check_fingerprints(folder: Path, stored: Mapping[str, str]) -> None:
    try:
        present = dict(_fingerprints(folder))
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be read: {error}.") from error
    changed = sorted(name for name, digest in stored.items() if present.get(name) != digest)
    if changed:
        raise TrainingError(
            f"{folder}: {', '.join(changed)} changed after {JSON_FILE} was written, as when another run is killed "
            "while it overwrites the folder."
        )
    if TRAINER_STATE_NAME not in stored:
        raise TrainingError(f"{folder / JSON_FILE}: incomplete (no digest of {TRAINER_STATE_NAME}).")


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
