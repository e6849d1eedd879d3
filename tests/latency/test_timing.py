import shutil
import time

import pytest
import tiny_models
import torch
from torch import nn

from hf_compress.graph.inputs import make_example_inputs
from hf_compress.latency import timing


def test_functions_take_turns_and_times_belong_to_their_functions() -> None:
    order: list[str] = []

    def make(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = timing.time_interleaved({"slow": make("slow", 0.02), "fast": make("fast", 0.006)}, rounds=3)
    assert order[-6:] == ["slow", "fast"] * 3
    assert [len(times) for times in found.values()] == [3, 3]
    assert min(found["slow"]) >= 20
    assert min(found["fast"]) >= 6
    assert timing.median(found["slow"]) > timing.median(found["fast"])


def test_fast_functions_are_called_several_times_a_round() -> None:
    calls = []
    found = timing.time_interleaved({"fast": lambda: calls.append(None)}, rounds=2)
    assert len(calls) == timing.WARM_UP_CALLS + 2 * timing.MAX_CALLS
    assert all(0 < milliseconds < timing.MIN_MILLISECONDS for milliseconds in found["fast"])


def test_median() -> None:
    assert timing.median([3.0, 1.0, 2.0]) == 2.0
    assert timing.median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_speedup_pairs_rounds_so_that_a_slow_moment_for_all_changes_nothing() -> None:
    assert timing.speedup([10.0, 100.0, 12.0], [5.0, 50.0, 6.0]) == 2.0


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_without_a_compiler_there_is_a_reason_and_no_failure(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiled, reason = timing.compile_model(Doubles(), [{"x": torch.ones(2)}])
    assert compiled is None
    assert reason is not None
    assert "C++ compiler" in reason


def test_a_failing_compilation_is_a_reason(monkeypatch) -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    compiled, reason = timing.compile_model(Refuses(), [{"x": torch.ones(2)}])
    assert compiled is None
    assert reason is not None
    assert "torch.compile failed" in reason


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    model = tiny_models.bert()
    inputs = [make_example_inputs(model, size) for size in (1, 3)]
    compiled, reason = timing.compile_model(model, inputs)
    if compiled is None:
        pytest.skip(str(reason))
    for example in inputs:
        with torch.no_grad():
            torch.testing.assert_close(compiled(**example).logits, model(**example).logits, rtol=1e-4, atol=1e-5)
