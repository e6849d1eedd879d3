"""What of a model folder may be published, and whether others could load it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_compress.errors import ExportError
from hf_compress.export.saving import WEIGHT_FILE
from hf_compress.reading import is_inside, read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ONNX = "model.onnx"
ONNX_FILES = (ONNX, f"{ONNX}.data")
TEMPLATES = "additional_chat_templates"

_KNOWN = re.compile(
    r"config\.json|generation_config\.json|(pre|video_pre)?processor_config\.json|audio_tokenizer_config\.json"
    r"|README\.md|results\.json|recipe\.yaml|quantization\.json|calibration\.json|(LICENSE|NOTICE)(\.txt|\.md)?"
    r"|[\w-]+\.(png|svg)"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|normalizer\.json|chat_template\.(json|jinja)"
    r"|((source|target|entity)_)?(vocab|vocabulary)\.(json|txt)|vocab-(src|tgt)\.json|merges\.txt|dict\.txt|bpe\.codes"
    r"|(spiece|spm|spm_char|tokenizer|sentencepiece|sentencepiece\.bpe)\.model|(source|target)\.spm"
    r"|prophetnet\.tokenizer|(emoji|byte_maps|word_shape|word_pronunciation)\.json"
)
"""Files beside the weights that are harmless, and of use to others."""

_OWN = re.compile(
    r"\..*|.*\.partial|checkpoint-\d+|last-checkpoint|runs|logs|stage\.json|run\.json|log_history\.json|report\.html"
    r"|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler|rng_state|hf_compress_state).*|(all|eval|train)_results\.json"
)
"""What runs leave behind for themselves."""


@dataclass(frozen=True)
class Contents:
    """The entries of a model folder."""

    files: tuple[str, ...]
    """What is published, with ``/`` between folder and file."""

    unknown: tuple[str, ...]
    """What is not, and is nothing that runs leave behind either."""


def contents_of(directory: Path) -> Contents:
    """Return what of a model folder is published.

    Raises:
        ExportError: If there is no folder, nobody could load it, or a file is a link to the outside.
    """
    if not directory.is_dir():
        raise ExportError(f"{directory}: is no folder; give the folder of a saved model.")
    weights = set(_weights(directory))
    templates = {f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).glob("*.jinja")}
    entries = {path.name for path in directory.iterdir()}
    known = {name for name in entries if _KNOWN.fullmatch(name) and (directory / name).is_file()}
    files = sorted(weights | templates | known)
    for name in files:
        _check_inside(directory, name)
    left = entries - set(files) - ({TEMPLATES} if templates else set())
    return Contents(tuple(files), tuple(sorted(name for name in left if not _OWN.fullmatch(name))))


def is_stale(name: str, files: tuple[str, ...]) -> bool:
    """Return whether a file of a repository holds weights that would be loaded instead of, or mixed with, new ones.

    Transformers takes ``model.safetensors`` before an index, so a model that has since been saved in shards would stay
    unread beside it.

    Args:
        name: Path in the repository.
        files: What is published.
    """
    onnx = name in ONNX_FILES
    weights = onnx or WEIGHT_FILE.fullmatch(name) is not None
    return weights and name not in files and onnx == (ONNX in files)


def _weights(directory: Path) -> Iterator[str]:
    """Yield the files of the weights; they are all there, and readable as far as their headers go."""
    whole, index = (directory / WEIGHTS).is_file(), (directory / INDEX).is_file()
    if whole and index:
        raise ExportError(
            f"{directory}: holds {WEIGHTS} and {INDEX}, so weights of two models. Save the model to a new folder."
        )
    if not (whole or index) and (directory / ONNX).is_file():
        yield from (name for name in ONNX_FILES if (directory / name).is_file())
        return
    if not isinstance(_read_json(directory / CONFIG), dict):
        raise ExportError(f"{directory / CONFIG}: is no JSON object. Save the model again with save_pretrained.")
    if whole:
        _stored_names(directory / WEIGHTS)
        yield WEIGHTS
    elif index:
        yield INDEX
        yield from _shards(directory)
    else:
        others = sorted(path.name for path in directory.glob("*.bin"))
        held = f", but {', '.join(others)}, which runs code when it is loaded" if others else ""
        raise ExportError(
            f"{directory}: holds no {WEIGHTS}, no {INDEX} and no {ONNX}{held}. Save the model with save_pretrained or "
            "export_quantized."
        )


def _shards(directory: Path) -> Iterator[str]:
    data = _read_json(directory / INDEX)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ExportError(f"{directory / INDEX}: has no weight_map of tensors to files. Save the model again.")
    for shard in sorted(set(places.values())):
        if not WEIGHT_FILE.fullmatch(shard):  # also keeps paths out of the folder from being read
            raise ExportError(
                f"{directory / INDEX}: names {shard!r}; allowed: files of this folder such as "
                "model-00001-of-00002.safetensors. Save the model again."
            )
        missing = {name for name, place in places.items() if place == shard} - _stored_names(directory / shard)
        if missing:
            raise ExportError(f"{directory / shard}: lacks {min(missing)!r}, which {INDEX} says it has. Save it again.")
        yield shard


def _stored_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as content:
            return set(content.keys())
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: cannot be read ({error}). Save the model again with save_pretrained.") from error


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: cannot be read ({error}). It is needed to load the model; save it again with save_pretrained."
        ) from error


def _check_inside(directory: Path, name: str) -> None:
    """A folder from elsewhere may link to a file that nobody means to publish."""
    path = directory / name
    if not is_inside(directory, path):
        raise ExportError(
            f"{path}: is a link to {path.resolve()}, outside of the folder, so it is not published. Put a copy in its "
            "place."
        )
