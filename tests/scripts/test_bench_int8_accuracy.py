"""The benchmark of quantized accuracy: what it concludes, and a small run of it that goes on where it was."""

import json
import sys

import pytest


@pytest.fixture
def bench(small_tasks):
    return small_tasks("int8_accuracy")


def test_a_small_run_goes_on_where_it_was(bench, tmp_path, monkeypatch) -> None:
    pytest.importorskip("torchao")
    path = tmp_path / "out" / "accuracy.json"
    small = ["--dense-steps", "20", "--steps", "2", "--batch-size", "8", "--learning-rate", "0.01"]
    rows = [bench.TORCHAO, "PTQ int8 static", "LSQ 4-bit weights"]
    monkeypatch.setattr(bench, "export_quantized", None)  # takes a process of its own; see the tests of exports
    for only in (rows[:1], rows):
        monkeypatch.setattr(sys, "argv", ["x", "--json", str(path), *small, "--seeds", "0", "--only", *only])
        bench.main()
    data = json.loads(path.read_text())
    assert [run["name"] for run in data["runs"]] == [bench.FP32, *rows]
    assert data["runs"][0]["accuracy"] == 1.0
    assert data["examples"] == 64
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in rows)
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(path), *small, "--steps", "3"])
    with pytest.raises(SystemExit, match="results of other settings"):
        bench.main()


def test_costs_are_those_of_the_same_seed(bench) -> None:
    runs = [
        {"seed": seed, "name": name, "accuracy": value}
        for name, values in {"fp32": [0.80, 0.84], "QAT int8 dynamic": [0.80, 0.835]}.items()
        for seed, value in enumerate(values)
    ]
    assert bench.costs(runs, "QAT int8 dynamic") == pytest.approx([0.0, 0.5])
    assert bench.verdict(runs, "QAT int8 dynamic") == "0.2, missed"
    assert bench.verdict(runs, "fp32") == ""
    assert bench.table(runs).splitlines()[3] == "| QAT int8 dynamic | 80.00 | 83.50 | +0.25 | 0.35 | 0.2, missed |"


def test_every_row_has_a_config_that_is_accepted(bench) -> None:
    assert bench.TARGETS.keys() <= set(bench.NAMES)
    assert len(set(bench.NAMES)) == len(bench.NAMES)
