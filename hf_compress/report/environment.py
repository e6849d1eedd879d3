"""On what and with which versions something was measured."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("hf-compress", "torch", "transformers", "accelerate", "datasets", "torchao")
CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, str]:
    """Return versions and hardware, for model cards and result files."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["cpu"] = _cpu_name()
    found["threads"] = str(torch.get_num_threads())
    found["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return found


def _cpu_name() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
