"""What a measured latency holds for: the device, the software, the model's shape and its inputs."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_compress.errors import ConfigError

CPU_INFO = Path("/proc/cpuinfo")
UNTIMED = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "id2label", "label2id")
"""Entries of a config that change no forward pass; the classes that have labels are in the key."""

Key = dict[str, str]
"""What was measured, by what can differ."""


def cpu_name() -> str:
    """Return what the processor calls itself."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def device_name(device: torch.device) -> str:
    """Return the name of a processor or accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else f"{device.type} of {cpu_name()}"


def latency_key(model: nn.Module, inputs: Mapping[str, Any]) -> Key:
    """Return everything that has to be the same for a measured latency to hold.

    Args:
        model: A transformers model.
        inputs: Keyword arguments for its ``forward``.
    """
    floating = [p for p in model.parameters() if p.is_floating_point()]
    config: Any = model.config
    return {
        "device": device_name(floating[0].device),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in floating})),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": type(model).__name__,
        "attention": str(config._attn_implementation),
        "config": config_digest(config.to_dict()),
        "inputs": ", ".join(f"{name} {_shape(value)}" for name, value in sorted(inputs.items())),
    }


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a digest of the entries of a config that matter for time."""
    kept = {name: value for name, value in config.items() if name not in UNTIMED}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_key(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Check that a measurement holds for what is to be decided by it.

    Raises:
        ConfigError: If not; the message says what differs.
    """
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if different:
        told = "; ".join(f"{name}: measured with {found.get(name)!r}, here {wanted.get(name)!r}" for name in different)
        raise ConfigError(f"LatencyTable: it was measured for something else. {told}. Measure again here.")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
