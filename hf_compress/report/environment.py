"""On what and with which versions something was measured."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

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
    commit = package_commit()
    if commit is not None:
        found["hf-compress commit"] = commit
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["cpu"] = cpu_name()
    found["threads"] = str(torch.get_num_threads())
    found["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return found


def package_commit() -> str | None:
    """Return the git commit that this package is from, if it lies in a clone or pip installed it from one."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        return _commit_of_clone(root)
    try:
        source = json.loads(distribution("hf-compress").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    commit = source.get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)


def _commit_of_clone(root: Path) -> str | None:
    """Return the commit of a clone, with a remark if the package differs from it."""
    commit, changes = (_git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", "hf_compress"))
    return f"{commit} and changes" if commit and changes else commit


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's clone
        return None
    return done.stdout.strip()
