"""On what and with which versions something was measured."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from hf_compress.latency.key import cpu_name

PACKAGES = ("hf-compress", "torch", "transformers", "accelerate", "datasets", "torchao")


def environment() -> dict[str, str]:
    """Return versions and hardware, for model cards and result files."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["cpu"] = cpu_name()
    found["threads"] = str(torch.get_num_threads())
    found["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return found
