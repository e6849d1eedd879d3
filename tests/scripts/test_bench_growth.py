"""The benchmark of how costs grow: what it concludes, and small measurements themselves."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
STEP = {"plain": [[1.0, 1.0]], "gates": [[1.1, 1.02]], "int8 QAT": [[1.2, 1.10]]}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("growth")


@pytest.fixture
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("growth_work")


def grown(power: float, values: list[float]) -> list[tuple[float, dict[str, float]]]:
    keys = ("graph", "shrink", "plan", "forward pass")
    return [(x, {**dict.fromkeys(keys, 0.1 + x**power), "memory": 2**20, "parameters": x}) for x in values]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_large_values(bench, power) -> None:
    points = grown(power, [1e-6, 1e-5, 1e6, 1e7, 1e8, 1e9])
    assert bench.exponent(points, "graph") == pytest.approx(power, abs=0.01)
    assert bench.exponent(list(reversed(points)), "graph") == pytest.approx(power, abs=0.01)


def test_the_report_and_the_picture_hold_what_was_measured(bench, monkeypatch, tmp_path, capsys) -> None:
    def run(script: str, kind: str, what: str, *rest: str) -> object:
        if script == "overhead_work.py":
            return STEP
        size = sum(json.loads(what).values()) if kind == "bert" else 1000 * len(what)
        return grown(1.0, [float(size)])[0][1]

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr("sys.argv", ["growth.py", "--json", str(tmp_path / "growth.json")])
    bench.main()
    text = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert "| Llama-3-8B |" in text
    assert "| BERT-base | 1.000 | 1.020 | 1.100 |" in text
    assert text.count("| exponent |") == 4
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))["series"]["layers"]) == 6
    assert "By width" in capsys.readouterr().out


def test_measurements_of_a_small_bert(work) -> None:
    found = work.measure_bert(layers=1, width=64, length=8)
    assert found["shrink"] > found["graph"] > 0
    model = work.bert(1, 64)
    assert found["parameters"] == model.num_parameters()
    assert {name: int(mask.sum()) for name, mask in work.halves(model).items()} == {"bert.encoder.layer.0.ffn": 128}


def test_measurements_without_weights(work, monkeypatch) -> None:
    monkeypatch.setitem(work.BERTS, "one layer", (1, 128))
    found = work.measure_shape("one layer")
    assert found["plan"] > 0
    assert found["memory"] >= 0
    assert work.shape("one layer").device == torch.device("meta")
    assert {*work.LLAMAS} == {"Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B"}
    assert work.shape("Llama-3-8B").num_parameters() == 8_030_261_248
