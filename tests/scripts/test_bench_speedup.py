"""The benchmark of speed-ups: what it concludes from its measurements, and a small run of it."""

import json
from pathlib import Path

import pytest
import torch
from fake_timer import FakeTimer, weights_in_layers

import hf_compress

BENCH = Path(hf_compress.__file__).parent.parent / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import speedup

    return speedup


def measured(bench, timer: FakeTimer):
    return bench.measure(
        bench.build("tiny"), bench.random_inputs(2, 8), target=2.0, multiple_of=4, rounds=3, timer=timer
    )


def test_on_a_machine_that_is_as_expected_everything_is_reached(bench) -> None:
    result = measured(bench, FakeTimer())
    pairs = zip(bench.CHECKED, result["checked"], strict=True)
    assert all(asked <= expected < 1.1 * asked for asked, (expected, _) in pairs)
    assert all(found == pytest.approx(expected) for expected, found in result["checked"])
    assert result["fitted"]["measured"] == pytest.approx(2.0, rel=0.03)
    text = bench.report(result, 2.0)
    assert text.count("reached") == len(bench.CHECKED) + 1
    assert "missed" not in text
    json.dumps(result)


def test_what_was_missed_is_said(bench) -> None:
    dense = weights_in_layers(bench.build("tiny"))
    jumpy = FakeTimer(lambda weights: 1 + weights / 1000 * (5 if dense * 0.2 < weights < dense else 1))
    text = bench.report(measured(bench, jumpy), 2.0)
    assert "| missed |" in text.replace(", missed", "| missed")
    assert "Asked for 2 times as fast: missed. fit_speedup: asked for 2 times as fast" in text


def test_verdicts(bench) -> None:
    assert bench.verdict(2.0, 2.2) == "+10.0%, reached"
    assert bench.verdict(2.0, 1.79) == "-10.5%, missed"


def test_a_run_writes_numbers_and_report(bench, tmp_path, capsys) -> None:
    path = tmp_path / "new" / "speedup.json"
    threads = torch.get_num_threads()
    options = ["--shape", "tiny", "--batch-sizes", "1", "--length", "8", "--rounds", "1", "--target", "2"]
    try:
        bench.main([*options, "--json", str(path)], timer=FakeTimer())
    finally:
        torch.set_num_threads(threads)
    data = json.loads(path.read_text())
    assert data["results"].keys() == {"1"}
    assert data["settings"]["target"] == 2.0
    assert len(data["load average"]) == 2
    assert capsys.readouterr().out.strip() in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("wrong", [["--target", "1"], ["--batch-sizes", "0"], ["--rounds", "0"]])
def test_wrong_options_are_refused(bench, wrong) -> None:
    with pytest.raises(SystemExit):
        bench.main(wrong)
