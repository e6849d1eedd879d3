"""The comparison of pruning methods: what it concludes, that it goes on where it was, and a small run of it."""

import json
import sys

import pytest


@pytest.fixture
def bench(small_tasks):
    return small_tasks("methods")


def arguments(path, *more) -> list[str]:
    small = ["--steps", "10", "--dense-steps", "20", "--batch-size", "8", "--learning-rate", "0.01"]
    return ["methods.py", "--json", str(path), *small, "--sparsities", "0.5", "--methods", *more]


def test_a_small_comparison_goes_on_where_it_was(bench, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "out" / "methods.json"
    monkeypatch.setattr(sys, "argv", arguments(path, "taylor"))
    bench.main()
    first = json.loads(path.read_text())["runs"]
    monkeypatch.setattr(sys, "argv", arguments(path, "random", "l2", "taylor", "movement"))
    bench.main()
    data = json.loads(path.read_text())
    assert data["runs"][0] == first[0]
    assert [run["method"] for run in data["runs"]] == ["taylor", "random", "l2", "movement"]
    assert data["dense"]["movies"] == {"accuracy": 1.0, "examples": 64}
    for run in data["runs"]:
        assert run["encoder_left"] == pytest.approx(0.5, abs=0.03)
        assert 0 <= run["accuracy"] <= 1
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "`movement` is" in text and text.count("| `") == 4
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*arguments(path, "taylor"), "--allocation", "per_layer"])
    with pytest.raises(SystemExit, match="results of other settings"):
        bench.main()


def runs_of(accuracies: dict[str, list[float]]) -> dict[str, object]:
    fixed = {"task": "movies", "seed": 0, "encoder_left": 0.5, "seconds": 1.0}
    runs = [
        {**fixed, "method": name, "sparsity": sparsity, "accuracy": value}
        for name, values in accuracies.items()
        for sparsity, value in zip((0.5, 0.9), values, strict=False)
    ]
    return {"runs": runs, "dense": {"movies": {"accuracy": 0.9, "examples": 100}}, "settings": {}}


def test_it_says_who_is_ahead_and_who_is_not(bench) -> None:
    data = runs_of({"random": [0.6, 0.5], "l2": [0.8, 0.6], "taylor": [0.9, 0.7], "apoz": [0.6, 0.5], "grain": [0.9]})
    lines = bench.verdicts(data, "movies")
    assert any("`taylor` is +10.0 points" in line for line in lines)
    assert any("Not ahead of chance: `apoz`." in line for line in lines)
    assert not any("grain" in line for line in lines)
    assert bench.table(data, "movies").splitlines()[2].split("`")[1] == "taylor"


def test_means_and_spreads(bench) -> None:
    assert bench.cell([0.5, 0.7]) == "60.0 ± 14.1"
    assert bench.cell([0.5]) == "50.0"
    assert bench.cell([]) == "-"
