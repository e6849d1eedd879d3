"""Packages of Debian and of the Python Package Index, fetched by their own clients, and folders that are made once."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import demo_data
from datasets import DatasetDict

SOURCES = "sources.json"
"""Package -> version, in every folder of data."""


class StandInError(demo_data.DemoDataError):
    """A stand-in's data or model could not be had, or are not what was expected."""


@dataclass(frozen=True)
class DebianPackage:
    """An unpacked package."""

    root: Path
    version: str

    def find(self, pattern: str) -> list[Path]:
        """Return the files that match a pattern of ``Path.rglob``, in order.

        Raises:
            StandInError: If there are none.
        """
        found = sorted(path for path in self.root.rglob(pattern) if path.is_file())
        if not found:
            raise StandInError(f"Debian package {self.root.name} {self.version}: holds no {pattern}.")
        return found


@contextmanager
def debian(name: str) -> Iterator[DebianPackage]:
    """Download and unpack a Debian package, without installing it; it is gone afterwards.

    Raises:
        StandInError: If this is no Debian, or the package cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading Debian's {name} ...", flush=True)
        _run(["apt-get", "download", "-qq", name], folder)
        file = next(iter(Path(folder).glob("*.deb")), None)
        if file is None:
            raise StandInError(f"apt-get download {name}: ended well, but left no package.")
        root = Path(folder) / name
        _run(["dpkg-deb", "-x", str(file), str(root)], folder)
        yield DebianPackage(root, _run(["dpkg-deb", "-f", str(file), "Version"], folder).strip())


def _run(command: list[str], folder: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise StandInError(f"{command[0]}: cannot be run ({error}). Stand-ins from Debian need Debian.") from error
    if done.returncode != 0:
        raise StandInError(
            f"{' '.join(command[:3])}: exit code {done.returncode}:\n{done.stderr.strip()}\nCheck the connection to "
            "the Debian mirror; `apt-get update` fetches the lists of packages."
        )
    return done.stdout


def folder_of(name: str) -> Path:
    """Return the folder of a stand-in in the cache."""
    return demo_data.cache_root() / "stand-ins" / name


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder, which ``make`` fills under another name if it is not there yet."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        os.replace(partial, target)
    return target


def save_data(data: DatasetDict, folder: Path, sources: Mapping[str, str]) -> None:
    """Save splits, and where they come from."""
    data.save_to_disk(folder)
    (folder / SOURCES).write_text(json.dumps(dict(sources), indent=1) + "\n", encoding="utf-8")
