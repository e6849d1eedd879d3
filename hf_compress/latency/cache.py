"""Latency tables on disk: a device is measured once for a model and a shape of inputs."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedModel

from hf_compress.errors import ConfigError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.latency.key import Key, latency_key
from hf_compress.latency.measure import DEFAULT_ROUNDS, STRUCTURES, Timer, measure_latency, time_in_turns
from hf_compress.latency.table import LatencyTable
from hf_compress.reading import read_text


def default_directory() -> Path:
    """Return where tables are kept: below the folder of the Hugging Face libraries (``HF_HOME``)."""
    return Path(constants.HF_HOME) / "hf_compress" / "latency"


def latency_table(
    model: PreTrainedModel,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    structures: Sequence[str] = STRUCTURES,
    multiple_of: int = 1,
    rounds: int = DEFAULT_ROUNDS,
    directory: str | Path | None = None,
    graph: ModelGraph | None = None,
    timer: Timer = time_in_turns,
) -> LatencyTable:
    """Return the measured latencies of a model: from disk, or else measured now and written there.

    Args:
        model: See ``measure_latency``.
        example_inputs: See ``measure_latency``.
        structures: See ``measure_latency``.
        multiple_of: See ``measure_latency``.
        rounds: See ``measure_latency``; a table of fewer rounds on disk is not measured again.
        directory: Folder of the tables; ``default_directory()`` by default.
        graph: See ``measure_latency``.
        timer: See ``measure_latency``.

    Raises:
        ConfigError: If the file is no table, or one of something else; or see ``measure_latency``.
        TargetError: See ``measure_latency``.
    """
    inputs = make_example_inputs(model) if example_inputs is None else dict(example_inputs)
    key = latency_key(model, inputs)
    path = Path(directory or default_directory()) / _file_name(key, structures, multiple_of)
    if path.exists():
        return _read(path, key)
    table = measure_latency(
        model,
        inputs,
        structures=structures,
        multiple_of=multiple_of,
        rounds=rounds,
        graph=graph,
        timer=timer,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(table.to_json(), encoding="utf-8")
    partial.replace(path)  # whoever reads meanwhile sees no half of it
    return table


def _file_name(key: Key, structures: Sequence[str], multiple_of: int) -> str:
    about = json.dumps([key, sorted(structures), multiple_of], sort_keys=True)
    return f"{key['model']}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def _read(path: Path, key: Key) -> LatencyTable:
    try:
        table = LatencyTable.from_json(read_text(path))
        table.check(key)
    except (OSError, ValueError) as error:  # a ConfigError is a ValueError
        raise ConfigError(f"{path}: {error} Delete this file to measure anew.") from error
    return table
