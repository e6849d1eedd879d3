"""What is built from the repository: all that the code reads, nothing else, and it works away from the repository."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hf_compress

PACKAGE = Path(hf_compress.__file__).parent
ROOT = PACKAGE.parent
FOREIGN = re.compile(r"(^|/)(tests|model_cards|scripts|\.cache|\.venv|\.ci|__pycache__)(/|$)|\.pyc$")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_data_files_are_declared() -> None:
    """Setuptools leaves out what is no module and not listed."""
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    data = {name for name in found if not name.endswith((".py", ".pyc"))}
    assert data == set(project()["tool"]["setuptools"]["package-data"]["hf_compress"])


def test_every_folder_of_modules_is_a_package() -> None:
    """Setuptools leaves out folders without an __init__.py."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(each) for each in folders if not (each / "__init__.py").is_file()] == []


@pytest.mark.parametrize("requirement", project()["project"]["dependencies"])
def test_requirements_have_a_lower_bound_and_no_other(requirement: str) -> None:
    """``scripts/test_versions`` tests with exactly these versions."""
    assert re.fullmatch(r"[A-Za-z_]+>=[\d.]+", requirement)


def run(*command: str, folder: Path, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist, of a copy of what git knows: builds write into the folder of the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = run("git", "ls-files", "-z", "--", "hf_compress", "pyproject.toml", "README.md", "LICENSE", folder=ROOT)
    for name in filter(None, names.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    script = (
        "from setuptools import build_meta\n"
        f"print(build_meta.build_sdist({str(out)!r}))\n"
        f"print(build_meta.build_wheel({str(out)!r}))\n"
    )
    run(sys.executable, "-c", script, folder=source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(built) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert modules <= set(names)
    assert {"hf_compress/py.typed", "hf_compress/report/references.yaml"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert [name for name in names if FOREIGN.search(name)] == []
    assert {name.split("/")[0] for name in names} == {
        "hf_compress",
        f"hf_compress-{project()['project']['version']}.dist-info",
    }


@pytest.mark.slow
def test_the_sdist_can_be_built_again(built) -> None:
    with tarfile.open(built[1]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "hf_compress/py.typed",
        "hf_compress/report/references.yaml",
    } <= set(names)
    assert [name for name in names if FOREIGN.search(name)] == []


@pytest.mark.slow
def test_the_wheel_works_away_from_the_repository(built, tmp_path) -> None:
    target = tmp_path / "target"
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(target)
    where = "import hf_compress, sys; print(hf_compress.__file__)"
    assert run(sys.executable, "-c", where, folder=tmp_path, path=str(target)).strip() == str(
        target / "hf_compress/__init__.py"
    )
    (entry,) = project()["project"]["scripts"].values()
    module, function = entry.split(":")
    command = f"import sys; from {module} import {function}; sys.argv = ['hf-compress', '--help']; {function}()"
    assert "inspect" in run(sys.executable, "-c", command, folder=tmp_path, path=str(target))
    read = "from hf_compress.report.references import *; import hf_compress.report.references as r; print(r.__file__)"
    assert str(target) in run(sys.executable, "-c", read, folder=tmp_path, path=str(target))
