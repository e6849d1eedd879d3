"""What the Hub does with a commit, and what it demands of a card's metadata."""

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

LARGE = {".safetensors", ".bin", ".onnx", ".pt", ".pth", ".model"}
"""Suffixes that a new repository's ``.gitattributes`` sends through LFS."""

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "llama3", "openrail", "other", "unknown"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}

Files = dict[str, bytes]


def is_large(path: str) -> bool:
    return PurePosixPath(path).suffix in LARGE


def commit_files(before: Files, lines: Iterable[Mapping[str, Any]], large: Mapping[str, bytes]) -> Files | str:
    """Return the files after a commit, or what is wrong with it."""
    files = dict(before)
    for key, value in ((line["key"], line["value"]) for line in lines):
        path = value.get("path", "")
        if path.startswith("/") or ".." in path.split("/"):
            return f"invalid path {path!r}"
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in large:
                return f"{path}: was not uploaded"
            files[path] = large[value["oid"]]
        elif key == "deletedFile":
            if path not in files:
                return f"{path}: A file with this name doesn't exist"
            del files[path]
        elif key == "deletedFolder":
            files = {name: data for name, data in files.items() if not name.startswith(path)}
    return files


def metadata_errors(card: str) -> list[str]:
    """Return what the Hub would refuse in the metadata of a card."""
    found = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data or {}, dict):
        return ["metadata is no mapping"]
    return [*_value_errors(data or {}), *_index_errors((data or {}).get("model-index"))]


def _value_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    license_name = data.get("license")
    if license_name is not None and license_name not in LICENSES:
        errors.append('"license" must be one of the known ones')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        well_formed = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
        errors += (
            [] if well_formed else [f'"base_model" with value {base!r} is not valid. Use a model id from the Hub.']
        )
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be texts')
    return errors


def _index_errors(index: Any) -> list[str]:
    errors = []
    for number, entry in enumerate(index or []):
        if not isinstance(entry.get("name"), str):
            errors.append(f'"model-index[{number}].name" must be a string')
        for result in entry.get("results", []):
            for part, needed in {"task": ("type",), "dataset": ("type", "name")}.items():
                errors += [f'"{part}.{key}" is required' for key in needed if not result.get(part, {}).get(key)]
            for metric in result.get("metrics", []):
                errors += [f'"metrics.{key}" is required' for key in ("type", "value") if metric.get(key) is None]
    return errors
