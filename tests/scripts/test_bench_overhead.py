"""The benchmark of overheads: what it concludes from its measurements, and small measurements themselves."""

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
    import overhead

    return overhead


@pytest.fixture
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import overhead_work

    return overhead_work


TIMES = {
    "plain": [[1.0, 2.0], [2.0, 4.0], [3.0, 2.0]],
    "gates": [[1.5, 2.0], [2.0, 4.1], [3.3, 2.1]],
    "distillation": [[1.5, 3.0], [3.0, 6.0], [9.0, 6.0]],
    "teacher forward": [[0.5, 1.0], [1.0, 2.0], [1.5, 1.0]],
}


def test_ratios_compare_steps_of_the_same_round(bench) -> None:
    assert bench.ratios(TIMES, "gates", 0)[0] == pytest.approx(1.1)  # of 1.5, 1 and 1.1
    assert bench.ratios(TIMES, "gates", 1)[0] == pytest.approx(1.025)  # of 1, 1.025 and 1.05
    assert bench.ratios({name: rounds[:1] for name, rounds in TIMES.items()}, "gates", 0) == (1.5, 1.5, 1.5)


def test_distillation_is_beside_the_student_and_the_teacher(bench) -> None:
    assert bench.ratios(TIMES, "distillation", 0)[0] == pytest.approx(1.0)  # of 1, 1 and 2


def test_the_tables_say_what_was_missed(bench) -> None:
    rows = {line.split("|")[1].strip(): line for line in bench.time_table(TIMES, on_gpu=False).splitlines()}
    assert "1.025" in rows["gates"] and rows["gates"].endswith("| 1.03 | reached |")
    slow = {**TIMES, "gates": [[1.0, 2 * each[1]] for each in TIMES["plain"]]}
    assert "| missed |" in bench.time_table(slow, on_gpu=False)
    assert rows["plain"].split("|")[2].strip() == "2.000"
    on_gpu = {line.split("|")[1].strip(): line for line in bench.time_table(TIMES, on_gpu=True).splitlines()}
    assert on_gpu["gates"].endswith("| 1.03 | missed |")  # 1.1 of the wall time


@pytest.mark.parametrize(("peak", "reached"), [(1000 + 200 + 10, True), (1000 + 200 + 11, False)])
def test_a_peak_may_rise_by_what_the_instruments_hold(bench, peak, reached) -> None:
    sizes = {"steady": 500, "kept for backward": 100}
    memory = {
        "plain": {**sizes, "peak": 1000, "instruments": 0},
        "gates": {**sizes, "peak": peak, "instruments": 200},
    }
    assert bench.within(memory, "gates") is reached
    assert bench.memory_table(memory).splitlines()[-1].endswith("| reached |" if reached else "| missed |")


def test_turns_are_taken_in_another_order_each_round(work) -> None:
    turns = work.Turns(["a", "b", "c"])
    order = []

    def take(name):
        for _ in range(3):
            with turns.turn(name):
                order.append(name)

    turns.run({name: lambda name=name: take(name) for name in "abc"})
    assert "".join(order) == "abcbcacab"
    assert all(len(turns.seconds[name]) == 3 for name in "abc")


def test_a_failure_in_one_thread_ends_all(work) -> None:
    turns = work.Turns(["a", "b"])

    def fail():
        with turns.turn("a"):
            raise ValueError("broken")

    def wait():
        for _ in range(2):
            with turns.turn("b"):
                pass

    with pytest.raises(ValueError, match="broken"):
        turns.run({"a": fail, "b": wait})


def test_memory_of_weight_masks_is_one_byte_for_each_weight(work) -> None:
    """Beyond the plain Trainer, after three steps, and while a step runs."""
    shape = work.SHAPES["tiny"]
    plain, masked = (work.measure_memory(shape, method) for method in ("plain", "weight masks"))
    weights = 4 * 32 * 32 + 2 * 32 * 64
    assert masked["instruments"] == weights
    assert masked["steady"] - plain["steady"] == weights
    assert masked["kept for backward"] == plain["kept for backward"]
    assert plain["kept for backward"] > 0
    # One layer's weight made again, float32, at most.
    assert weights <= masked["peak"] - plain["peak"] <= weights + 4 * 32 * 64


def test_quantizers_keep_scales_alone(work) -> None:
    """One float32 a token or output, where the quantized numbers themselves would be thousands."""
    shape = work.SHAPES["tiny"]
    plain, quantized = (work.measure_memory(shape, method) for method in ("plain", "int8 QAT"))
    assert quantized["instruments"] == 0
    assert quantized["steady"] == plain["steady"]
    assert quantized["kept for backward"] == plain["kept for backward"]


def test_gates_keep_no_activation(work) -> None:
    shape = work.SHAPES["tiny"]
    plain, gated = (work.measure_memory(shape, method) for method in ("plain", "gates"))
    assert gated["instruments"] == (2 + 64) * 13  # two heads, 64 units
    # Factors, one float32 for each of the consumers' inputs, and which unit each belongs to (int64).
    assert 0 < gated["kept for backward"] - plain["kept for backward"] <= 3 * (32 + 64) * 8


@pytest.mark.slow
def test_measurements_are_printed_as_json() -> None:
    command = [sys.executable, str(BENCH / "overhead_work.py"), "time", "tiny", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert list(found) == [
        "plain",
        "gates",
        "weight masks",
        "int8 QAT",
        "distillation",
        "cached teacher",
        "teacher forward",
    ]
    assert all(len(rounds) == 2 and all(wall > 0 for wall, _ in rounds) for rounds in found.values())
