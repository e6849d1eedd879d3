"""The benchmark of int8 latencies: what it concludes, and a run of a tiny model."""

import json
import sys
from pathlib import Path

import pytest

import hf_compress

BENCH = Path(hf_compress.__file__).parent.parent / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "0")  # of the whole process
    import int8

    return int8


def test_speedups_are_those_of_the_same_round(bench) -> None:
    times = {"fp32 eager": [8.0, 16.0], "int8 compiled": [1.0, 4.0], "ONNX Runtime int8": [2.0, 3.0]}
    differs = dict(zip(times, (0.0, 0.0123, 0.02), strict=True))
    result = {"milliseconds": times, "differs": differs, "skipped": {"OpenVINO": "not installed: nncf"}}
    first, second = bench.verdicts(result)
    assert first == "- int8 compiled: 6.00x, target 4x reached."
    assert second == "- int8 compiled: 1.38x as fast as ONNX Runtime int8, target 1x reached."
    lines = bench.table(result).splitlines()
    assert "| int8 compiled | 2.50 | 6.00x | 4x | 1.2 % |" in lines
    assert lines[-1] == "OpenVINO: left out, not installed: nncf."


def test_a_tiny_model_runs_every_way(bench, tmp_path, monkeypatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(bench, "compile_model", lambda model, inputs: (None, "not in tests"))
    path = tmp_path / "int8.json"
    arguments = ["--shapes", "tiny", "--batch-sizes", "1", "2", "--length", "8", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["int8.py", *arguments])
    monkeypatch.setitem(bench.PEERS, "OpenVINO", ("nothing_of_this_name",))
    bench.main()
    data = json.loads(path.read_text())
    assert set(data["results"]["tiny"]) == {"1", "2"}
    for found in data["results"]["tiny"].values():
        assert {"fp32 eager", "bf16 eager", "int8 eager"} <= found["milliseconds"].keys()
        assert found["differs"]["fp32 eager"] == 0 < found["differs"]["int8 eager"] < 0.05
        assert found["skipped"]["OpenVINO"] == "not installed: nothing_of_this_name"
        assert found["skipped"]["int8 compiled"] == "not in tests"
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# How fast an int8 model is")


def test_the_summary_counts_who_is_ahead(bench) -> None:
    times = {
        "fp32 eager": [6.0],
        "int8 compiled": [2.0],
        "pruned 75 % + int8 compiled": [1.0],
        "ONNX Runtime int8": [3.0],
    }
    faster = {**times, "ONNX Runtime int8": [1.5]}
    data = {
        "results": {"BERT-base": {"1": {"milliseconds": times}, "8": {"milliseconds": faster}}},
        "settings": {"length": 16},
        "environment": {"cpu": "a CPU", "threads": "1"},
    }
    text = bench.summary(data)
    assert text.startswith("BERT-base with batches of 1, 8 texts of 16 tokens, 1 thread(s) of an a CPU:")
    assert (
        "| int8 compiled | 3.0x to 3.0x | - |" in text and "| pruned 75 % + int8 compiled | 6.0x to 6.0x | - |" in text
    )
    assert "| ONNX Runtime int8 | 2.0x to 4.0x | 1 of 2 |" in text
    assert "OpenVINO" not in text  # not measured


def test_the_readme_has_the_summary_of_what_is_stored(bench) -> None:
    bench.readme(check=True)
    stored = json.loads(bench.STORED.read_text(encoding="utf-8"))
    assert bench.summary(stored) in (bench.ROOT / "README.md").read_text(encoding="utf-8")
