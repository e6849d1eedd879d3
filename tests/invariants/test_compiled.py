"""torch.compile: compiled training is training, and what changes in a run (gates, quantizers) reaches compiled code."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from training_runs import (
    METHODS,
    NO_DROPOUT,
    NUM_EXAMPLES,
    Recorder,
    cases_of_methods,
    compression,
    distance,
    history,
    neutral,
    same,
)

from hf_compress import QuantizationCallback, shrink

EAGER = {"torch_compile": True, "torch_compile_backend": "eager"}
"""Traces, guards and recompiles like any backend, then runs the same operators: equal means equal bit for bit."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def trained(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> Any:
    """``trained(callbacks, **args)``: Trainer and recorder after training, evaluated before, while and after."""

    def train(callbacks: list[Any], dropout: bool = True, **args: Any) -> tuple[Any, Recorder, list[float]]:
        recorder = Recorder()
        options = {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, **args}
        data = classification_data(NUM_EXAMPLES, length=8)
        trainer = make_trainer(
            tiny_bert(num_hidden_layers=1, **({} if dropout else NO_DROPOUT)),
            data[:16],
            [*callbacks, recorder],
            per_device_eval_batch_size=4,
            optim="sgd",
            **options,
        )
        losses = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        for callback in callbacks:
            if isinstance(callback, QuantizationCallback):
                callback.detach()
                losses.append(trainer.evaluate()["eval_loss"])
        return trainer, recorder, losses

    return train


@cases_of_methods("all")
def test_compiled_runs_are_runs(trained: Any, tiny_bert: Any, method: str) -> None:
    """Quantization begins in the middle, masks change at steps 2 and 3, gates go at the end; all with dropout."""
    results = []
    for args in ({}, EAGER):
        callbacks = compression(METHODS[method], tiny_bert(seed=1, num_hidden_layers=1), begin=2)
        results.append(trained(callbacks, **args))
    (trainer, plain, losses), (compiled, recorder, compiled_losses) = results
    assert counters["stats"]["unique_graphs"] > 0
    for step, (a, b) in enumerate(zip(plain.weights, recorder.weights, strict=True), start=1):
        assert same(a, b), f"weights after step {step}"
    assert compiled_losses == losses
    assert history(compiled) == history(trainer)
    if method in ("pruning", "all"):
        assert same(shrink(compiled).state_dict(), shrink(trainer).state_dict())


@pytest.mark.slow
def test_neutral_callbacks_are_neutral_when_compiled(trained: Any) -> None:
    """Law 1."""
    trainer, plain, _ = trained([], **EAGER)
    other, recorder, _ = trained(neutral(("quantization", "pruning"), 4), **EAGER)
    for step in range(3):
        assert same(plain.weights[step], recorder.weights[step]), f"weights after step {step + 1}"
    assert history(other, 3) == history(trainer, 3)


@pytest.mark.slow
def test_new_masks_do_not_compile_again(trained: Any) -> None:
    """Gates change in place: a mask at every step costs no more graphs than two masks do."""
    graphs = []
    for end in (2, 8):
        torch._dynamo.reset()
        counters.clear()
        trained(compression(("pruning",), end=end), max_steps=8, eval_strategy="no", **EAGER)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends_that_change_operators(trained: Any, tiny_bert: Any, backend: str) -> None:
    """Fused kernels round elsewhere, and int8 quantization turns a last bit into a step of 1/127 here and there."""
    results = []
    for args in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        callbacks = compression(METHODS["all"], tiny_bert(seed=1, num_hidden_layers=1), begin=2)
        results.append(trained(callbacks, dropout=False, eval_strategy="no", **args))
    (_, plain, losses), (compiled, recorder, compiled_losses) = results
    for a, b, tolerance in zip(plain.weights, recorder.weights, (1e-5, 1e-5, 1e-3, 1e-3), strict=True):
        assert distance(b, a) < tolerance
    assert compiled_losses == pytest.approx(losses, rel=5e-3)
    assert shrink(compiled).num_parameters() < 0.9 * compiled.model.num_parameters()
