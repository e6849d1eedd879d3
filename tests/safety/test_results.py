"""What runs leave in folders, made by others: results, logs and facts, through every command that reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import ESCAPE, JSON, YAML, changed, contained, make_outside, refused
from report_folders import write_run

from hf_compress import cli
from hf_compress.config import ParameterSpace, SearchConfig
from hf_compress.errors import ConfigError, ExportError
from hf_compress.export.card import write_card
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.stages import Facts
from hf_compress.recipe.trials import run_trials
from hf_compress.report.html import write_report


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def edit(path: Path, where: str, value: Any) -> None:
    path.write_text(json.dumps(changed(json.loads(path.read_text()), where, value)))


def trials(run: Path) -> None:
    search = SearchConfig(trials=1, space={"training.learning_rate": ParameterSpace(type="float", low=1e-5, high=1e-4)})
    run_trials(search, 1, run, lambda number, settings: None)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "report, run.json": ("run.json", write_report),
    "report, results.json": ("compressed/results.json", write_report),
    "report, log_history.json": ("compressed/log_history.json", write_report),
    "report, stage.json": ("compressed/stage.json", write_report),
    "report of a model": ("compressed/results.json", lambda run: write_report(run / "compressed")),
    "card": ("compressed/results.json", lambda run: write_card(run / "compressed")),
    "finished run": ("run.json", RunResult.load),
    "facts of a stage": ("compressed/stage.json", lambda run: Facts.load(run / "compressed/stage.json")),
    "trials": ("trials.json", trials),
}
"""Who reads -> the file, and how it is read."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("attack", JSON)
def test_files(reader, attack, run) -> None:
    name, read = READERS[reader]
    if attack in ("unknown key", "control characters", "a long name") and reader == "trials":
        pytest.skip("a list of settings, whose names are checked against the search's own")
    (run / name).write_bytes(JSON[attack])
    refused(run, lambda: read(run), name, ConfigError)


@pytest.mark.parametrize("attack", YAML)
def test_recipes_of_runs(attack, run) -> None:
    (run / "recipe.yaml").write_bytes(YAML[attack])
    refused(run, lambda: write_report(run), "recipe.yaml", ConfigError)


@pytest.mark.parametrize("attack", JSON)
def test_states_of_trainers(attack, run) -> None:
    """Of a stage that is not over, the log is in the newest checkpoint."""
    (run / "compressed/log_history.json").unlink()
    state = run / "checkpoints/stage-2/checkpoint-7/trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_bytes(JSON[attack])
    refused(run, lambda: write_report(run), "trainer_state.json", ConfigError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("folders/compressed", "../outside"),
        ("folders/compressed", "/etc"),
        ("folders/compressed", "compressed/../../outside"),
        ("folders/compressed", "link"),
        ("folders/compressed", ""),
        ("folders/compressed", 5),
        ("folders/compressed", None),
        ("folders/compressed", "a\0b"),
        ("folders/compressed", ESCAPE),
        ("folders/compressed", "n" * 100_000),
        ("folders", ["compressed"]),
        ("folders", 5),
        ("comparison", []),
        ("comparison/profiles", {}),
        ("comparison/profiles/dense", 5),
        ("comparison/profiles/dense/parameters", 0),
        ("comparison/profiles/dense/parameters", -1),
        ("comparison/profiles/dense/parameters", float("nan")),
        ("comparison/profiles/dense/parameters", float("inf")),
        ("comparison/profiles/dense/parameters", "1"),
        ("comparison/profiles/dense/parameters", True),
        ("comparison/profiles/dense/parameters", 10**400),
        ("comparison/profiles/dense/flops", [1]),
        ("comparison/profiles/dense/peak_memory", "x"),
        ("comparison/profiles/dense/inputs", {"input_ids": 5}),
        ("comparison/latency_ms", 5),
        ("comparison/latency_ms/batch 1", {"compressed": "fast"}),
        ("comparison/speedup/batch 1", {"compressed": []}),
        ("comparison/metrics", {"accuracy": {"dense": "high"}}),
        ("comparison/metrics", {"accuracy": 5}),
        ("comparison/notes", "a text"),
        ("comparison/notes", [1]),
        ("comparison/environment", [1]),
        ("notes", 5),
        ("notes", "a text"),
        ("metrics", 5),
    ],
)
@pytest.mark.parametrize("read", [write_report, RunResult.load], ids=["report", "finished run"])
def test_values_of_runs(read, where, value, run) -> None:
    (run / "link").symlink_to(make_outside(run))
    edit(run / "run.json", where, value)
    refused(run, lambda: read(run), "run.json", ConfigError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("name", 5),
        ("name", "a: b\n---\nx: !!python/object:os.system"),
        ("model", "../../outside"),
        ("base_model", ["x"]),
        ("task", None),
        ("dataset", {}),
        ("auto_class", 7),
        ("auto_class", 'AutoModel"); import os'),
        ("requires", "x'; touch outside/ran; '"),
        ("language", 5),
        ("checks", "a text"),
        ("checks", [1]),
        ("checks", 5),
        ("training", [1]),
        ("training", 5),
        ("num_evaluation_examples", True),
        ("num_evaluation_examples", "many"),
        ("num_evaluation_examples", -1),
        ("kept", 5),
        ("kept", {"heads": 5}),
        ("kept", {"heads": [5]}),
        ("kept", {"heads": [{"name": "a", "kept": -1, "total": 2}]}),
        ("kept", {"heads": [{"name": "a", "kept": True, "total": 2}]}),
        ("kept", {"heads": [{"name": "a", "kept": 1, "total": 0}]}),
        ("kept", {"heads": [{"name": "a", "kept": 3, "total": 2}]}),
        ("kept", {"heads": [{"name": "a", "kept": 1, "total": 10**12, "more": 1}]}),
        ("kept", {"heads": [{"name": 5, "kept": 1, "total": 2}]}),
        ("kept", {"heads": [{"name": "a", "kept": float("nan"), "total": 2}]}),
        ("recipe", 5),
        ("recipe", {"model": 5}),
        ("recipe/stages/0/pruning", {"structures": {"heads": float("nan")}}),
        ("comparison/profiles/dense/parameters", float("nan")),
        ("comparison/profiles/compressed/parameters", 0),
        ("comparison/profiles/compressed/parameters", "x"),
        ("comparison/metrics/accuracy (%)/compressed", "high"),
        ("comparison/metrics/accuracy (%)/compressed", None),
        ("comparison/latency_ms/batch 1", [1]),
    ],
)
@pytest.mark.parametrize("read", [write_card, write_report], ids=["card", "report"])
def test_values_of_results(read, where, value, run) -> None:
    folder = run / "compressed"
    edit(folder / "results.json", where, value)
    refused(run, lambda: read(folder), "results.json", ConfigError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("0", 5),
        ("0/step", "x"),
        ("0/step", True),
        ("0/step", -1),
        ("0/step", float("nan")),
        ("0/step", 10**30),
    ],
)
def test_values_of_logs(where, value, run) -> None:
    edit(run / "compressed/log_history.json", where, value)
    refused(run, lambda: write_report(run), "log_history.json", ConfigError)


@pytest.mark.parametrize("value", ["x", True, -1, float("inf"), 10**30, None])
def test_numbers_of_steps(value, run) -> None:
    edit(run / "compressed/stage.json", "optimizer_steps", value)
    refused(run, lambda: write_report(run), "stage.json", ConfigError)


@pytest.mark.parametrize("name", ["report.html", "report.html.partial"])
def test_a_report_replaces_links(name, run) -> None:
    outside = make_outside(run)
    (run / name).symlink_to(outside / "secret.json")
    before = (outside / "secret.json").read_bytes()
    page = write_report(run)
    assert (outside / "secret.json").read_bytes() == before
    assert page.read_text().startswith("<!DOCTYPE html>") and not page.is_symlink()


@pytest.mark.parametrize("name", ["README.md", "kept_units.png", "recipe.yaml"])
def test_a_card_follows_no_links(name, run) -> None:
    folder = run / "compressed"
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(make_outside(run) / "secret.json")
    refused(run, lambda: write_card(folder), name, ExportError)


def test_a_page_shows_text_as_text(run) -> None:
    edit(run / "run.json", "notes", ["<script>alert(1)</script>"])
    with contained(run):
        page = write_report(run).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("command", ["report", "card"])
@pytest.mark.parametrize("attack", ["deep lists", "random", "a key twice", "a future version"])
def test_commands(command, attack, run, capsys) -> None:
    (run / "compressed/results.json").write_bytes(JSON[attack])
    with contained(run):
        assert cli.main([command, str(run / "compressed")]) == cli.EXIT_ERROR
    assert "results.json" in capsys.readouterr().err
