"""``cache_teacher_outputs``: runs a teacher over the training data once and stores what it says."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer

from hf_compress.errors import CompressionError, ConfigError, TrainingError
from hf_compress.instruments.adapters import without_wrapper
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.inputs import InputSpec
from hf_compress.teachers.live import model_digest, output_specs, speaking, teacher_outputs
from hf_compress.teachers.loader import to_device, training_batches
from hf_compress.teachers.manifest import DRAFT, MANIFEST, SCHEMA_VERSION, Content, Manifest, leftovers, read_manifest
from hf_compress.teachers.moving import may_move
from hf_compress.teachers.request import StorageRequest, check_count, check_top_k, stored_parts
from hf_compress.teachers.shards import ShardWriter, as_bytes, known_keys

SHARD_BYTES = 256 << 20
_PACKAGES = ("torch", "transformers", "safetensors")


def cache_teacher_outputs(
    teacher: PreTrainedModel,
    data: Trainer | DataLoader[Any] | Iterable[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    temperature: float | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    batch_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> TeacherCache:
    """Run a teacher over all training examples once and store its logits, to distill without running it again.

    Examples are known by their contents, so training may shuffle, batch, pad and distribute them as it likes; data
    that changes between epochs (augmentation, dynamic masking) cannot be cached. A cache that is there already is
    reused if it fits teacher, settings and data; one that was interrupted is gone on with. Token-level outputs are
    stored without padding; padding before an example is allowed where it changes nothing of what the teacher says
    (relative positions), see ``may_move``. In a run of several processes every one has to call this, and the first
    does the work; a long one is better done beforehand in a process of its own.

    Args:
        teacher: Runs in eval mode on the device it is on.
        data: The Trainer, whose training data, collator and removal of columns are used; a DataLoader, whose data and
            collator are; or batches as they are.
        directory: A new or empty directory, or an earlier cache.
        top_k: Store the k largest logits only, and what the others add up to; for large vocabularies. None: all.
        temperature: One or several, at which the others are added up: those of the loss. Needed with ``top_k`` only.
        dtype: To store logits in: float32, float16 or bfloat16.
        autocast: Compute in float16 or bfloat16; None: as the teacher's weights are.
        batch_size: Examples of a batch; None: as the Trainer or data loader has it.
        shard_bytes: Size at which a file is complete; an interruption loses at most as much.

    Raises:
        ConfigError: If a setting is not allowed, or the directory holds something else.
        TrainingError: If the teacher's outputs cannot be cached, or a cache that is there is damaged.
    """
    request = StorageRequest.of(top_k, temperature, dtype, autocast)
    if not isinstance(without_wrapper(teacher), PreTrainedModel):
        raise ConfigError(
            f"cache_teacher_outputs: teacher is a {type(teacher).__name__}; allowed: a transformers PreTrainedModel."
        )
    check_count("shard_bytes", shard_bytes)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if not isinstance(directory, str | os.PathLike) or not directory:
        raise ConfigError(f"cache_teacher_outputs: directory is {directory!r}; allowed: the path of a directory.")
    folder = Path(directory)
    _on_first_process(lambda: _Build(teacher, request, folder, shard_bytes).run(data, batch_size))
    return TeacherCache.open(folder)


def _on_first_process(work: Any) -> None:
    """Do something in the first process while the others wait; if it fails, all fail.

    Raises:
        CompressionError: On the other processes, if the first failed.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        work()
        return
    failed: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except BaseException as error:
            dist.broadcast_object_list([f"{type(error).__name__}: {error}"])
            raise
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise CompressionError(f"cache_teacher_outputs failed on the first process: {failed[0]}")


@dataclass
class _Build:
    """One run of a teacher over the data."""

    teacher: PreTrainedModel
    request: StorageRequest
    folder: Path
    shard_bytes: int

    def run(self, data: Any, batch_size: int | None) -> None:
        """Write what is missing, or check that nothing is."""
        self._check_folder()
        device = next(self.teacher.parameters()).device
        hidden = isinstance(data, Trainer) and data.args.disable_tqdm
        writer: ShardWriter | None = None
        known: set[bytes] = set()
        complete = (self.folder / MANIFEST).exists()
        num_missing = 0
        with training_batches(data, batch_size) as batches, speaking(self.teacher):
            for batch in tqdm(batches, desc="teacher outputs", disable=hidden):
                inputs = to_device(batch, device)
                if writer is None:
                    writer, known = self._begin(inputs)
                _check_place(writer.draft.content.inputs, inputs)
                keys = writer.draft.content.inputs.keys(inputs).cpu()
                new = _first_seen(keys, known)
                num_missing += len(new)
                if new and not complete:
                    self._add(writer, inputs, keys, torch.tensor(new))
        if writer is None:
            raise TrainingError("cache_teacher_outputs: there are no training examples; give data that has some.")
        if not complete or not num_missing:
            writer.finish()
        else:
            raise ConfigError(
                f"{self.folder}: this cache of the same teacher lacks {num_missing} of the training examples, so it is "
                "of other data or preprocessing. Use another directory, or delete this one to make it anew."
            )

    def _check_folder(self) -> None:
        """Leave directories of something else alone."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"cache_teacher_outputs: {self.folder} is a file; give a directory.")
        self.folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in set(self.folder.iterdir()) - set(leftovers(self.folder)))
        if names and not {MANIFEST, DRAFT} & set(names):
            raise ConfigError(
                f"cache_teacher_outputs: {self.folder} holds other things ({names[0]}, ...); give a new or empty "
                "directory, or an earlier cache."
            )

    def _begin(self, inputs: Mapping[str, Any]) -> tuple[ShardWriter, set[bytes]]:
        """Find out what there is to store from the first batch, and what there is already."""
        earlier = next((name for name in (MANIFEST, DRAFT) if (self.folder / name).exists()), None)
        stored = None if earlier is None else read_manifest(self.folder, earlier)
        content = self._content(inputs, None if stored is None else stored.content.inputs.moves)
        if stored is None:
            plain = without_wrapper(self.teacher)
            config = json.loads(json.dumps(plain.config.to_dict(), default=str))
            about = {"class": type(plain).__name__, "config": config}
            draft = Manifest(SCHEMA_VERSION, content, (), about, {name: version(name) for name in _PACKAGES})
            draft.write(self.folder, DRAFT)
        else:
            draft = stored
            _check_same(self.folder, draft.content, content)
        known = known_keys(self.folder, draft.shards, content)
        return ShardWriter(self.folder, draft, self.shard_bytes), known

    def _content(self, inputs: Mapping[str, Any], moves: bool | None) -> Content:
        spec = InputSpec.of(self.teacher, inputs)
        autocast = self.request.autocast
        moves = may_move(self.teacher, inputs, spec, autocast) if moves is None else moves
        spec = dataclasses.replace(spec, moves=moves)
        outputs = teacher_outputs(self.teacher, inputs, autocast)
        specs = output_specs(outputs, spec.output_counts(inputs))
        check_top_k(self.request.top_k, specs)
        digest = model_digest(self.teacher)
        request = self.request
        return Content(
            digest, spec, specs, request.dtype_name, request.computed_in, request.top_k, request.temperatures
        )

    def _add(self, writer: ShardWriter, inputs: Mapping[str, Any], keys: Tensor, new: Tensor) -> None:
        content = writer.draft.content
        outputs = teacher_outputs(self.teacher, inputs, self.request.autocast)
        counts = content.inputs.output_counts(inputs)
        specs = output_specs(outputs, counts)
        if specs != content.outputs:
            raise TrainingError(
                f"teacher cache: the outputs of a batch are {[each.shape for each in specs]}, those of the first one "
                f"{[each.shape for each in content.outputs]}, per example or position; they must have the same shape. "
                "Pad or resize inputs to one shape, or use the live teacher."
            )
        per_position = any(each.per_position for each in specs)
        lengths = torch.zeros_like(new) if counts is None or not per_position else counts.sum(1).cpu()[new]
        writer.add(keys[new], lengths, stored_parts(outputs, counts, new.to(keys.device), content))


def _check_place(spec: InputSpec, inputs: Mapping[str, Any]) -> None:
    moved = spec.moved(inputs)
    if moved is not None and bool(moved.any()):
        raise TrainingError(
            "teacher cache: a batch has padding before its examples, and what this teacher says depends on how much, "
            "which differs from batch to batch. Pad on the right (tokenizer.padding_side = 'right')."
        )


def _first_seen(keys: Tensor, known: set[bytes]) -> list[int]:
    """Return the numbers of the examples that are not known, each content once, and add them to what is known."""
    new = []
    for number, key in enumerate(as_bytes(keys)):
        if key not in known:
            known.add(key)
            new.append(number)
    return new


def _check_same(folder: Path, stored: Content, wanted: Content) -> None:
    names = [each.name for each in dataclasses.fields(Content)]
    different = [name for name in names if getattr(stored, name) != getattr(wanted, name)]
    if different:
        told = "; ".join(f"{name}: {getattr(stored, name)} there, {getattr(wanted, name)} now" for name in different)
        raise ConfigError(
            f"{folder}: holds a cache of something else ({told}). Use another directory, or delete this one."
        )
