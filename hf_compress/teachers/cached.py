"""``TeacherCache``: the stored outputs of a teacher, looked up by the contents of a batch."""

import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigError, TrainingError
from hf_compress.teachers.live import model_digest
from hf_compress.teachers.manifest import Manifest, OutputSpec, read_manifest
from hf_compress.teachers.outputs import SparseLogits, TeacherOutputs
from hf_compress.teachers.rows import KeyTable, padded_rows, with_sentinels
from hf_compress.teachers.shards import read_shard

RESIDENT_BYTES = 256 << 20
"""Caches up to this size are loaded whole, to the device that the batches are on."""


class TeacherCache:
    """Stored outputs of a teacher.

    ``outputs`` stands in for the teacher's forward pass. Every process opens the same directory; nothing is written.
    Small caches are held on the training device, where a look-up waits for nothing: examples that are not found give
    NaN, and ``check``, called once for each optimizer step, raises. Larger ones are mapped from disk row by row.
    """

    def __init__(self, directory: Path, manifest: Manifest, shards: list[dict[str, Tensor]], resident: bool) -> None:
        self.directory = directory
        """Where the outputs are."""

        self.manifest = manifest
        """What they are of: teacher, data and preprocessing."""

        self.resident = resident
        """Whether they are held in memory, and not read row by row."""

        self._shards = shards
        self._ends = list(accumulate(len(shard["keys"]) for shard in shards))
        self._starts = [(shard["lengths"].cumsum(0) - shard["lengths"]).tolist() for shard in shards]
        self._table = KeyTable.of(*(torch.cat([shard[name] for shard in shards]) for name in ("keys", "lengths")))
        self._tables: dict[torch.device, KeyTable] = {}
        self._loaded: dict[torch.device, dict[str, Tensor]] = {}
        self._missing: Tensor | None = None
        self._moved: Tensor | None = None

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        teacher: nn.Module | None = None,
        *,
        verify: bool | None = None,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> "TeacherCache":
        """Open a cache made by ``cache_teacher_outputs``.

        Args:
            directory: The cache.
            teacher: The model that it must be from; None: any.
            verify: Whether to compare the digests of all files, for which they are read; None: if the cache is small.
                Manifest, names, shapes, sizes, hashes and lengths are checked always.
            resident_bytes: Up to this size of all files the cache is small.

        Raises:
            TrainingError: If there is no cache, it is damaged, or from another teacher.
        """
        folder = Path(directory)
        manifest = read_manifest(folder)
        resident = sum(shard.num_bytes for shard in manifest.shards) <= resident_bytes
        verified = resident if verify is None else verify
        if not any(shard.num_examples for shard in manifest.shards):
            raise TrainingError(f"{folder}: holds no examples. Delete it and make the cache anew.")
        shards = [read_shard(folder, shard, manifest.content, verify=verified) for shard in manifest.shards]
        cache = cls(folder, manifest, shards, resident)
        if cache._table.has_duplicates():
            raise TrainingError(f"{folder}: damaged: it holds an example twice. Delete it and make the cache anew.")
        if verified:
            for shard in shards:
                cache._check_indices(shard)
        if teacher is not None:
            cache.check_teacher(teacher)
        return cache

    def check_teacher(self, teacher: nn.Module) -> None:
        """Check that the outputs are those of this model.

        Raises:
            TrainingError: If not.
        """
        if model_digest(teacher) != self.manifest.content.teacher_digest:
            raise TrainingError(
                f"{self.directory}: these are the outputs of another teacher: a "
                f"{self.manifest.teacher.get('class')} with other weights or another config. Give the teacher that the "
                "cache was made with, or make one for this teacher in another directory."
            )

    def outputs(
        self, inputs: Mapping[str, Any], *, labels: Tensor | None = None, temperature: float | None = None
    ) -> TeacherOutputs:
        """Return what the teacher said about the examples of a batch, however they are padded.

        Args:
            inputs: Keyword arguments that the student is called with.
            labels: Where the Trainer took them out of ``inputs``; only encoder-decoder models need them.
            temperature: Of the loss, if only some classes are stored; None: the only one that there is.

        Raises:
            TrainingError: If the batch has other inputs, an example is not found, or it has padding before it, which
                changes what this teacher says. On an accelerator the latter two are raised in ``check``, by a small
                cache, which until then returns NaN for what it does not find.
            ConfigError: If the rest of the classes was not summed up at this temperature.
        """
        column = self._column(temperature)
        spec, content = self.manifest.content.inputs, self.manifest.content
        keys = spec.keys(inputs, labels)
        self._note_moved(inputs)
        per_position = any(output.per_position for output in content.outputs)
        counts = spec.output_counts(inputs, labels) if per_position else None
        if per_position and counts is None:
            raise TrainingError(
                f"teacher cache: the batch with {sorted(inputs)} does not show its positions, as it did when "
                f"{self.directory} was made. Use the same collator, or make the cache anew."
            )
        lengths = torch.zeros_like(keys[:, 0]) if counts is None else counts.sum(1)
        if self.resident:
            parts, rows, starts, found = self._find_resident(keys, lengths)
        else:
            parts, rows, starts, found = self._find_mapped(keys, lengths)
        given: dict[str, Tensor | SparseLogits] = {}
        for output in content.outputs:
            first = starts if output.per_position else rows
            mask = counts if output.per_position else None
            read = {
                part: padded_rows(parts[f"{output.name}.{part}"], first, mask, found) for part in content.names(output)
            }
            given[output.name] = self._as_given(output, read, column)
        return TeacherOutputs(given, counts)

    def logits(
        self, inputs: Mapping[str, Any], *, labels: Tensor | None = None, temperature: float | None = None
    ) -> Tensor | SparseLogits | dict[str, Tensor | SparseLogits]:
        """Return the logits alone, or all outputs by name if there are others; see ``outputs``."""
        given = self.outputs(inputs, labels=labels, temperature=temperature).outputs
        return given["logits"] if set(given) == {"logits"} else given

    def check(self) -> None:
        """Check that all examples since the last call were found; waits for the device.

        Raises:
            TrainingError: If not.
        """
        missing, self._missing = self._missing, None
        moved, self._moved = self._moved, None
        if moved is not None:
            self._require_unmoved(int(moved))
        if missing is not None:
            self._require_found(int(missing))

    def fingerprint(self) -> str:
        """Return a text that tells caches apart: by teacher and by what is stored in which form."""
        content = self.manifest.content
        kept = f"{content.top_k} {content.temperatures} {content.dtype} {content.computed_in}"
        return f"{content.teacher_digest} {kept}"

    def describe(self) -> str:
        """Return what it is, for people."""
        num_examples = sum(shard.num_examples for shard in self.manifest.shards)
        return f"{self.manifest.teacher.get('class')}, outputs for {num_examples:,} examples in {self.directory}"

    def _column(self, temperature: float | None) -> int:
        stored = self.manifest.content.temperatures
        if not stored:
            return 0
        if temperature is None and len(stored) == 1:
            return 0
        if temperature not in stored:
            raise ConfigError(
                f"{self.directory}: holds the rest of the classes at temperature "
                f"{', '.join(str(each) for each in stored)}, not {temperature}. Use one of these, or make a cache with "
                f"temperature={temperature}."
            )
        return stored.index(temperature)

    def _as_given(self, output: OutputSpec, read: Mapping[str, Tensor], column: int) -> Tensor | SparseLogits:
        values = read["values"].float()
        if "indices" not in read:
            return values
        temperature = self.manifest.content.temperatures[column]
        rest = read["log_rest"][..., column]
        return SparseLogits(values, read["indices"].long(), rest, temperature, output.shape[-1])

    def _find_resident(self, keys: Tensor, lengths: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Return all stored rows, and where those of a batch begin: by example, by position, and whether found."""
        device = keys.device
        if device not in self._tables:
            self._tables[device] = self._table.to(device)
            names = [name for name in self._shards[0] if name not in ("keys", "lengths")]
            whole = {name: torch.cat([shard[name] for shard in self._shards]) for name in names}
            self._loaded[device] = {name: with_sentinels(tensor.to(device)) for name, tensor in whole.items()}
        rows, starts, found = self._tables[device].find(keys, lengths)
        missing = (~found).sum()
        if _waits(device):
            self._missing = missing if self._missing is None else self._missing + missing
        else:
            self._require_found(int(missing))
        return self._loaded[device], rows, starts, found

    def _find_mapped(self, keys: Tensor, lengths: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Read the rows of a batch from disk; the rest is as in ``_find_resident``."""
        device = keys.device
        hashes = torch.cat([keys, lengths.unsqueeze(1)], dim=1).cpu()
        rows, _, found = self._table.find(hashes[:, :2], hashes[:, 2])
        self._require_found(int((~found).sum()))
        pieces: dict[str, list[Tensor]] = {}
        for row, length in zip(rows.tolist(), hashes[:, 2].tolist(), strict=True):
            for name, piece in self._pieces(row, length).items():
                pieces.setdefault(name, []).append(piece)
        read = {name: torch.cat(parts) for name, parts in pieces.items()}
        self._check_indices(read)
        if device.type == "cuda":
            read = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in read.items()}
        starts = lengths.cumsum(0) - lengths
        parts = {name: with_sentinels(tensor.to(device)) for name, tensor in read.items()}
        return parts, torch.arange(len(keys), device=device), starts, torch.ones_like(starts, dtype=torch.bool)

    def _pieces(self, row: int, length: int) -> dict[str, Tensor]:
        """Return the stored rows of one example."""
        number = bisect_right(self._ends, row)
        shard = self._shards[number]
        row -= self._ends[number] - len(shard["keys"])
        start = self._starts[number][row]
        content = self.manifest.content
        return {
            f"{output.name}.{part}": shard[f"{output.name}.{part}"].narrow(
                0, *((start, length) if output.per_position else (row, 1))
            )
            for output in content.outputs
            for part in content.names(output)
        }

    def _check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that classes exist: on an accelerator, a wrong one would end the process."""
        for output in self.manifest.content.outputs:
            indices = tensors.get(f"{output.name}.indices")
            if indices is None or indices.numel() == 0:
                continue
            low, high = (int(each) for each in indices.aminmax())
            if low < 0 or high >= output.shape[-1]:
                raise TrainingError(
                    f"{self.directory}: damaged: {output.name} has class {low if low < 0 else high} of "
                    f"{output.shape[-1]}. Delete it and make the cache anew."
                )

    def _note_moved(self, inputs: Mapping[str, Any]) -> None:
        moved = self.manifest.content.inputs.moved(inputs)
        if moved is None:
            return
        number = moved.sum()
        if _waits(number.device):
            self._moved = number if self._moved is None else self._moved + number
        else:
            self._require_unmoved(int(number))

    def _require_unmoved(self, num_moved: int) -> None:
        if num_moved:
            raise TrainingError(
                f"{self.directory}: {num_moved} of the examples trained on have padding before them, and what this "
                f"{self.manifest.teacher.get('class')} says depends on how much. Pad on the right "
                "(tokenizer.padding_side = 'right'), or use the live teacher."
            )

    def _require_found(self, num_missing: int) -> None:
        if num_missing:
            names = ", ".join(self.manifest.content.inputs.hashed)
            raise TrainingError(
                f"{self.directory}: {num_missing} of the examples trained on are not in this cache of teacher outputs "
                f"(examples are known by the contents of: {names}). The data, the tokenizer or the preprocessing is "
                "another one than when the cache was made, or changes from epoch to epoch, as augmentation and dynamic "
                "masking do. Make the cache anew, make the changes once in the dataset, or use the live teacher."
            )


def _waits(device: torch.device) -> bool:
    """Return whether reading a number from the device would wait for all work before it."""
    return device.type != "cpu"
