"""The peers: what to install for each, and what each is asked to do."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH, TRANSFORMERS = "torch==2.13.0", "transformers==5.24.0"
OLD = ("torch==1.13.1", "transformers==4.30.2", "numpy==1.26.4", "safetensors==0.4.5")
"""The last release of torch's first series, and the transformers of that time: what the older peers run with."""

OURS = "hf_compress"
DENSE = "dense"
INSTALL_SECONDS = 1800


@dataclass(frozen=True)
class Peer:
    """A library that a user might pick."""

    title: str
    worker: str
    """File in ``peers``."""

    packages: tuple[str, ...] = ()
    """What pip installs into its environment; nothing for what runs in this one."""

    imports: tuple[str, ...] = ()
    """Modules that have to be there afterwards."""

    prune: tuple[str, ...] = ()
    """Ways of pruning."""

    quantize: tuple[str, ...] = ()
    """Ways of quantizing."""

    architectures: bool = False
    """Whether it can be asked to prune any architecture."""

    python: str = ""
    """Version of Python that it needs, such as ``3.10``; this one by default."""

    needs_import: str | None = None
    """Module that its documentation says to import before ``from_pretrained``."""


PEERS: dict[str, Peer] = {
    OURS: Peer(
        "hf_compress", "with_hf_compress.py", prune=("default", "taylor", "even", "l2"), quantize=("ptq", "qat"),
        architectures=True, needs_import="hf_compress",
    ),
    "torch-pruning": Peer(
        "Torch-Pruning", "with_torch_pruning.py", (TORCH, TRANSFORMERS, "torch-pruning==1.6.1"), ("torch_pruning",),
        prune=("magnitude", "taylor", "taylor, across layers"), architectures=True,
    ),
    "nni": Peer(
        "NNI", "with_nni.py",
        (*OLD, "nni==3.0", "scipy==1.11.4", "pandas==2.1.4", "scikit-learn==1.3.2"), ("nni.compression.speedup",),
        prune=("l1", "taylor"), architectures=True, python="3.10",
    ),
    "textpruner": Peer(
        "TextPruner", "with_textpruner.py", (*OLD[:2], "safetensors==0.4.5", "textpruner==1.1.post2"), ("textpruner",),
        prune=("importance",), architectures=True, python="3.10",
    ),
    "torchao": Peer(
        "torchao", "with_torchao.py", (TORCH, TRANSFORMERS, "torchao==0.18.0", "accelerate==1.15.0"), ("torchao",),
        quantize=("ptq",),
    ),
    "onnxruntime": Peer(
        "ONNX Runtime", "with_onnxruntime.py",
        (TORCH, TRANSFORMERS, "onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"), ("onnxruntime",),
        quantize=("dynamic",),
    ),
    "openvino": Peer(
        "OpenVINO", "with_openvino.py",
        (TORCH, TRANSFORMERS, "onnx==1.23.2", "onnxscript==0.7.2", "openvino==2026.4.1", "nncf==3.4.0"),
        ("openvino", "nncf"), quantize=("ptq",),
    ),
    "modelopt": Peer(
        "ModelOpt", "with_modelopt.py",
        (TORCH, TRANSFORMERS, "nvidia-modelopt==0.47.0", "accelerate==1.15.0", "requests"),
        ("modelopt.torch.distill", "modelopt.torch.quantization"), quantize=("ptq", "smoothquant", "qat"),
    ),
}  # fmt: skip


def interpreter(version: str) -> str | None:
    """Return a Python of a version, or None if this machine has none; pyenv's are looked through as well."""
    if not version:
        return sys.executable
    known = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in (f"python{version}", *map(str, known)):
        try:
            done = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        if done.stdout.startswith(f"Python {version}."):
            return candidate
    return None


def install(peer: Peer, folder: Path) -> tuple[Path | None, str]:
    """Make the environment of a peer, unless it is there; return its Python, or None and the reason."""
    if not peer.packages:
        return Path(sys.executable), ""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, done = "\n".join(peer.packages), folder / "installed.txt"
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python, ""
    base = interpreter(peer.python)
    if base is None:
        return None, f"needs Python {peer.python}, which is not here"
    commands = [
        [base, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages],
        [str(python), "-c", "; ".join(f"import {each}" for each in peer.imports)],
    ]
    for command in commands:
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            lines = [line for line in (getattr(error, "stderr", "") or str(error)).splitlines() if line.strip()]
            errors = [line for line in lines if "ERROR" in line or "Error" in line]
            return None, (errors or lines or [str(error)])[-1].strip()[:300]
    done.write_text(wanted, encoding="utf-8")
    return python, ""
