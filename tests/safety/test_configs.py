"""Recipes, sweeps and the configs of methods, from files that others wrote."""

import os
from pathlib import Path

import pytest
from hostile import JSON, YAML, contained, refused

from hf_compress import cli
from hf_compress.config import (
    DatasetConfig,
    DistillationConfig,
    PruningConfig,
    QuantizationConfig,
    Recipe,
    SweepConfig,
)
from hf_compress.errors import ConfigError
from hf_compress.report.results import Results

KINDS = (DatasetConfig, DistillationConfig, PruningConfig, QuantizationConfig, Recipe, Results, SweepConfig)
READERS = (PruningConfig, Recipe, Results, SweepConfig)
FILES = [(f"c.{kind}", name, data) for kind, table in (("json", JSON), ("yaml", YAML)) for name, data in table.items()]

VALUES = [
    ("PruningConfig", "structures: 7"),
    ("PruningConfig", "structures: {heads: .nan}"),
    ("PruningConfig", "structures: {heads: .inf}"),
    ("PruningConfig", "structures: {heads: -0.5}"),
    ("PruningConfig", "structures: {heads: true}"),
    ("PruningConfig", "structures: {heads: 1000000000000}"),
    ("PruningConfig", "structures: {heads: [0.5]}"),
    ("PruningConfig", "structures: {../../x: 0.5}"),
    ("PruningConfig", "target_params: 1.0e+400"),
    ("PruningConfig", "target_flops: .nan"),
    ("PruningConfig", "structures: {heads: 0.5}\nexclude: ['(']"),
    ("PruningConfig", "structures: {heads: 0.5}\nexclude: ['a{99999999999}']"),
    ("PruningConfig", f"structures: {{heads: 0.5}}\nexclude: ['{'(' * 50_000}']"),
    ("PruningConfig", "structures: {heads: 0.5}\nexclude: {a: b}"),
    ("PruningConfig", "structures: {heads: 0.5}\ncriterion: [taylor]"),
    ("PruningConfig", "structures: {heads: 0.5}\nbegin: .nan"),
    ("PruningConfig", "structures: {heads: 0.5}\nbegin: '1e999 epochs'"),
    ("PruningConfig", "structures: {heads: 0.5}\nrules: 5"),
    ("QuantizationConfig", "weights: 5"),
    ("QuantizationConfig", "scheme: {a: b}"),
    ("QuantizationConfig", "method: [qat]"),
    ("QuantizationConfig", "begin: .inf"),
    ("DistillationConfig", "alpha: .nan"),
    ("DistillationConfig", "alpha: true"),
    ("DistillationConfig", "temperature: 0"),
    ("DistillationConfig", "temperature: -.inf"),
    ("DistillationConfig", "features: {a: b}"),
    ("DatasetConfig", "path: [1]"),
    ("SweepConfig", "recipe: 5\noutput: x\nruns: {a: {}}"),
    ("SweepConfig", "recipe: {}\noutput: x\nruns: {../../a: {}}"),
    ("SweepConfig", "recipe: {}\noutput: x\nruns: {/etc/a: {}}"),
    ("SweepConfig", "recipe: {}\noutput: x\nruns: {a: {}}\nseeds: [true]"),
    ("SweepConfig", "recipe: {}\noutput: x\nruns: {a: {}}\nseeds: [1, 1]"),
    ("Recipe", "model: 5"),
    ("Recipe", "model: m\ntask: t\ndataset: []"),
    ("Recipe", "stages: {}"),
]


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("name", "data"), [(n, d) for n, _, d in FILES], ids=[f"{f[2:]}: {n}" for f, n, _ in FILES])
def test_files(kind, name, data, tmp_path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / name).write_bytes(data)
    refused(folder, lambda: kind.load(folder / name), name, ConfigError)


@pytest.mark.parametrize(("kind", "text"), VALUES, ids=[f"{kind}: {text[:60]!r}" for kind, text in VALUES])
def test_values(kind, text, tmp_path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "c.yaml").write_text(text)
    loader = next(each for each in KINDS if each.__name__ == kind)
    refused(folder, lambda: loader.load(folder / "c.yaml"), kind, ConfigError)


def folder_of_its_name(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


@pytest.mark.parametrize("make", [folder_of_its_name, pipe, endless, circle, nowhere])
@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_what_is_no_file(make, name, tmp_path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    make(folder / name)
    refused(folder, lambda: Recipe.load(folder / name), name, ConfigError)


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize(("name", "data"), [(n, d) for n, _, d in FILES], ids=[f"{f[2:]}: {n}" for f, n, _ in FILES])
def test_commands(command, name, data, tmp_path, capsys) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / name).write_bytes(data)
    with contained(folder):
        assert cli.main([command, str(folder / name), "--dry-run"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err.startswith("error: ")
