"""The benchmark of distillation: what it concludes, and a small run of it that goes on where it was."""

import json
import sys

import pytest


@pytest.fixture
def bench(small_tasks):
    return small_tasks("distillation")


def arguments(path, *seeds) -> list[str]:
    small = ["--steps", "10", "--dense-steps", "20", "--batch-size", "8", "--learning-rate", "0.01", "--workers", "0"]
    return ["distillation.py", "--json", str(path), "--task", "movies", *small, "--seeds", *seeds]


def test_a_small_run_goes_on_where_it_was(bench, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "out" / "distillation.json"
    for seeds in (["0"], ["0", "1"]):
        monkeypatch.setattr(sys, "argv", arguments(path, *seeds))
        bench.main()
    data = json.loads(path.read_text())
    assert [(run["seed"], run["kind"]) for run in data["runs"]] == [(s, kind) for s in (0, 1) for kind in bench.KINDS]
    assert data["dense"] == {"accuracy": 1.0, "examples": 64}
    assert all(run["encoder_left"] == pytest.approx(0.25, abs=0.05) for run in data["runs"])
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("points from `none`") == 2
    monkeypatch.setattr(sys, "argv", [*arguments(path, "0"), "--sparsity", "0.5"])
    with pytest.raises(SystemExit, match="results of other settings"):
        bench.main()


def test_a_margin_counts_beside_the_spread(bench) -> None:
    accuracies = {"none": [0.60, 0.62], "logits": [0.63, 0.65], "logits + hidden": [0.60, 0.64]}
    runs = [
        {"seed": seed, "kind": kind, "accuracy": value}
        for kind, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    first, second = bench.verdicts(runs)
    assert "`logits` is +3.0 points from `none`: more than the spread of 1.4" in first
    assert "`logits + hidden` is +1.0 points from `none`: not more than the spread of 2.8" in second
    assert bench.verdicts(runs[:3]) == []
    assert bench.table(runs).splitlines()[2] == "| none | 60.0 | 62.0 | 61.0 | 1.4 |"
