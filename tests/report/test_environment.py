import json
import subprocess

import pytest

import hf_compress.report.environment as environments
from hf_compress.report.environment import environment, package_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Installed:
    """A distribution with a ``direct_url.json``, as pip writes it."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    def read_text(self, name: str) -> str | None:
        return self.text if name == "direct_url.json" else None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder of its own."""
    file = tmp_path / "hf_compress" / "report" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(environments, "__file__", str(file))
    return tmp_path


def git(folder, *command: str) -> str:
    settings = ("-c", "user.name=me", "-c", "user.email=me@example.com")
    return subprocess.run(
        ["git", "-C", str(folder), *settings, *command], check=True, capture_output=True, text=True
    ).stdout


def test_versions_and_hardware() -> None:
    found = environment()
    assert {"python", "torch", "transformers", "system", "cpu", "threads", "gpu"} <= set(found)
    assert found.get("hf-compress commit") == package_commit()


def test_the_commit_of_a_clone_and_whether_the_package_was_changed(package) -> None:
    git(package, "init")
    git(package, "add", ".")
    git(package, "commit", "-m", "first")
    head = git(package, "rev-parse", "HEAD").strip()
    (package / "notes.txt").write_text("not of the package")
    assert package_commit() == head
    (package / "hf_compress" / "new.py").write_text("")
    assert package_commit() == f"{head} and changes"


def test_a_clone_without_commits_has_none(package) -> None:
    git(package, "init")
    assert package_commit() is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps({"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}), COMMIT),
        (json.dumps({"url": "file:///home/me", "dir_info": {}}), None),
        (None, None),
        ("{", None),
    ],
)
def test_the_commit_that_pip_installed(package, monkeypatch, text, expected) -> None:
    monkeypatch.setattr(environments, "distribution", lambda name: Installed(text))
    assert package_commit() == expected


def test_a_package_that_is_not_installed_has_none(package, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise environments.PackageNotFoundError(name)

    monkeypatch.setattr(environments, "distribution", missing)
    assert package_commit() is None
