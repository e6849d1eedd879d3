"""The benchmark of compressed models on a GPU: what its table says, and a small run of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_compress

BENCH = Path(hf_compress.__file__).parent.parent / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    return gpu


def test_the_table_compares_each_way_with_the_same_way_of_the_dense_model(bench) -> None:
    result = {
        "milliseconds": {
            "fp32 eager": [8.0, 8.0],
            "bf16 eager": [4.0, 6.0],
            "bf16 compiled": [2.0, 2.0],
            "int8 compiled": [1.0, 0.5],
        },
        "differs": {"fp32 eager": 0.0, "bf16 eager": 0.01, "bf16 compiled": 0.02, "int8 compiled": 0.03},
        "parameters": {"fp32": 2_000_000, "bf16": 2_000_000, "int8": 2_000_000, "pruned 50 %": 1_000_000},
    }
    rows = {line.split("|")[1].strip(): [each.strip() for each in line.split("|")[2:-1]] for line in
            bench.table(result).splitlines()}  # fmt: skip
    assert rows["bf16"] == ["2.0 M", "5.000", "1.00x", "2.000", "1.00x", "2.0 %"]
    assert rows["int8"] == ["2.0 M", "-", "-", "0.750", "3.00x", "3.0 %"]  # of 2 and 4
    assert rows["fp32"][1:3] == ["8.000", "0.62x"]
    assert rows["pruned 50 %"] == ["1.0 M", "-", "-", "-", "-", "-"]


def test_pruned_models_lose_the_share_that_their_name_says(bench) -> None:
    dense = bench.build("tiny")
    small = bench.pruned(dense, 0.75)
    assert small.config.num_attention_heads == 4  # what the dense one has; layers say what they keep
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 24
    assert small.bert.encoder.layer[0].attention.self.query.out_features == 8
    assert dense.bert.encoder.layer[0].intermediate.dense.out_features == 96


def test_only_matrices_of_sizes_that_sparse_units_take_are_stored_sparse(bench) -> None:
    masks = {"query": torch.ones(128, 64, dtype=torch.bool), "classifier": torch.ones(2, 64, dtype=torch.bool)}
    assert bench.halved(masks) == ["query"]
    with pytest.raises(RuntimeError, match="no matrix"):
        bench.halved({"classifier": masks["classifier"]})


@pytest.mark.slow
def test_a_run_without_a_gpu_says_what_it_left_out(tmp_path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCH / "gpu.py"), "--shapes", "tiny", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())["results"]["tiny"]["1"]
    assert ("2:4" in result["skipped"]) == (not torch.cuda.is_available())
    assert {"fp32 eager", "bf16 eager", "pruned 90 % eager"} <= set(result["milliseconds"])
    assert "tiny, batch 1, 8 tokens" in out.with_suffix(".md").read_text()
