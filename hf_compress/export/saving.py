"""Write a model folder apart from its target, check it there, and put it in place in one go."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_compress.errors import ExportError

MAIN_FILES = ("config.json", "model.onnx")
"""Without one of these nothing loads a folder."""

_WEIGHTS = r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
WEIGHT_FILE = re.compile(rf"{_WEIGHTS}|model\.onnx\.data")
"""Names under which weights are saved."""

STAGING_PREFIX = ".hf-compress-"
"""Of the folder that a model is written to first."""


def check_target(directory: Path) -> None:
    """Check that a model may be written to a folder.

    Raises:
        ExportError: If it is a file, or holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise ExportError(f"{directory}: is a file; allowed: a folder, or a path that does not exist.")
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    held = {name for name in held if not name.startswith(STAGING_PREFIX)}  # of a process that was killed
    if held and held.isdisjoint(MAIN_FILES):
        raise ExportError(
            f"{directory}: holds files but no model (no {' and no '.join(MAIN_FILES)}), so it is not overwritten. "
            "Choose another folder."
        )


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Give an empty folder whose files are moved to ``directory`` at the end, unless there was an exception.

    They are moved file by file; what a folder cannot be loaded without goes first and comes last, so a process killed
    in between leaves no mix of two models that loads. A folder that exists, which may be a link or a mount, holds the
    empty one itself: files cannot be moved from one file system to another after the earlier model is gone.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        where = directory if directory.is_dir() else directory.parent
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=where))
    except OSError as error:
        raise ExportError(f"{directory}: cannot be written ({error}). Choose another folder.") from error
    try:
        yield staging
        directory.mkdir(exist_ok=True)
        for name in MAIN_FILES:
            (directory / name).unlink(missing_ok=True)
        for stale in [path for path in directory.iterdir() if WEIGHT_FILE.fullmatch(path.name)]:
            stale.unlink()
        for path in sorted(staging.iterdir(), key=lambda path: path.name in MAIN_FILES):
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def tidy_metadata(path: Path) -> None:
    """Mend the metadata of a weight file.

    safetensors writes it in random order, so equal models would differ in bytes. torchao's list of tensors must not
    hold tensors of the model itself, such as BART's ``final_logits_bias``: its loader takes every name apart at a dot.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = dict(sorted(header["__metadata__"].items()))
        if "tensor_names" in metadata:
            names = json.loads(metadata["tensor_names"])
            metadata["tensor_names"] = json.dumps([name for name in names if "." in name])
        header["__metadata__"] = metadata
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the offsets that follow count from the header's end, so its length stays
            file.seek(8)
            file.write(text.ljust(size))
