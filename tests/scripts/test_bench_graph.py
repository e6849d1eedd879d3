"""The benchmark of graphs: what it concludes from its measurements, and one measurement itself."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress

BENCH = Path(hf_compress.__file__).parent.parent / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import graph

    return graph


@pytest.fixture
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import graph_work

    return graph_work


def measured(first: float, again: float, **phases: float):
    return {
        "first": {**phases, "all": first, "CPU time": first},
        "again": {**phases, "all": again, "CPU time": again},
        "peak_memory": 2**30,
        "memory_before": 2**29,
        "parameters": [100, 50],
        "logits": [0.25, -1.0],
    }


def results():
    return {
        "hf_compress": [measured(0.5, 0.25, capture=0.2), measured(1.5, 0.5, capture=0.4)],
        "torch-pruning": [measured(2.5, 1.5, graph=1.0), measured(4.5, 2.5, graph=1.0)],
        "pruner": [measured(5.0, 5.0, graph=1.0), measured(5.0, 5.0, graph=1.0)],
        "llama": [measured(19.0, 19.0, capture=1.0), measured(22.0, 22.0, capture=1.0)],
    }


def test_ratios_compare_measurements_of_the_same_round(bench) -> None:
    found = bench.verdicts(results())
    assert found["torch-pruning / hf_compress, first: times, at least 4"] == (4.0, True)  # of 5 and 3
    assert found["torch-pruning / hf_compress, again: times, at least 4"] == (5.5, True)  # of 6 and 5
    assert found["pruner / hf_compress, again: times"] == (15.0, None)
    assert found["BERT-base: seconds, at most 1"] == (1.0, True)
    assert found["Llama-3-8B: seconds, at most 20"] == (20.5, False)
    assert found["Llama-3-8B: GB of memory, at most 2"] == (2**30 / 1e9, True)


def test_without_the_other_library_the_rest_is_reported(bench) -> None:
    own = {name: rounds for name, rounds in results().items() if name in ("hf_compress", "llama")}
    text = bench.report(own, bench.verdicts(own))
    assert "Llama-3-8B: seconds, at most 20: 20.50 (missed)" in text
    assert "torch-pruning" not in text


def test_the_table_has_a_column_for_each_and_medians(bench) -> None:
    lines = bench.table({k: v for k, v in results().items() if k != "llama"}).splitlines()
    assert lines[0].split() == ["hf_compress", "torch-pruning", "pruner"]
    rows = [" ".join(line.split()) for line in lines]
    assert "first, capture 300 ms - -" in rows
    assert "again, all 375 ms 2000 ms 5000 ms" in rows


@pytest.mark.parametrize("change", [{"parameters": [100, 51]}, {"logits": [0.25, -1.001]}])
def test_unequal_work_is_no_comparison(bench, change) -> None:
    ours = measured(1.0, 1.0)
    bench.check_equal(ours, copy.deepcopy(ours))
    with pytest.raises(SystemExit, match="not the same work"):
        bench.check_equal(ours, {**ours, **change})


def test_phases_are_disjoint_and_functions_are_restored(work, tiny_bert) -> None:
    import torch

    from hf_compress.graph import model as graph

    before = graph.capture
    planned, seconds = work.plan_seconds(tiny_bert(), {"bert.encoder.layer.0.ffn": torch.arange(48) < 24}, None)
    assert graph.capture is before
    assert list(seconds) == ["capture", "analysis", "plan"]
    assert all(value > 0 for value in seconds.values())
    assert planned.num_parameters[1] < planned.num_parameters[0]


@pytest.mark.slow
def test_one_measurement() -> None:
    command = [sys.executable, str(BENCH / "graph_work.py"), "llama"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["parameters"] == [8030261248, 4540600320]
    assert found["first"]["all"] < 20
    assert found["peak_memory"] < 2e9
