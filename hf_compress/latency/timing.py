"""Wall times that can be compared: everything in one run, in turns, so that a noisy machine is noisy for all."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import GraphError
from hf_compress.graph.capture import evaluating

DEFAULT_ROUNDS = 15
WARM_UP_CALLS = 3
MIN_MILLISECONDS = 5.0
"""A round calls a fast function so often that it takes about this long."""

MAX_CALLS = 50
CPP_COMPILERS = ("g++", "clang++", "c++", "cl")

Progress = Callable[[str], object]
"""Called with a line that says what happens next."""


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = DEFAULT_ROUNDS
) -> dict[str, list[float]]:
    """Time functions in turns.

    Args:
        functions: What to time, by name. Each is called a few times first to warm up.
        rounds: How often everything is measured.

    Returns:
        Milliseconds per call, one number a round; numbers of the same round belong together.
    """
    calls = {name: _calls_per_round(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_milliseconds(function, calls[name]))
    return times


def _calls_per_round(function: Callable[[], object]) -> int:
    for _ in range(WARM_UP_CALLS - 1):
        function()
    once = _milliseconds(function, 1)
    return max(1, min(MAX_CALLS, round(MIN_MILLISECONDS / max(once, 1e-3))))


def _milliseconds(function: Callable[[], object], calls: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize()
    return (time.perf_counter() - start) * 1000 / calls


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def time_models(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Any], *, rounds: int = DEFAULT_ROUNDS
) -> dict[str, list[float]]:
    """Time forward passes of models in turns, in eval mode and without gradients; the models are left as they were.

    Args:
        models: What to time, by name; models compiled with ``torch.compile`` too.
        inputs: Keyword arguments for each ``forward``.
        rounds: How often everything is measured.

    Returns:
        See ``time_interleaved``.

    Raises:
        GraphError: If a model does not run on the inputs.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(unwrap(model)))
            run_once(model, inputs)
        calls = {name: partial(model, **inputs) for name, model in models.items()}
        return time_interleaved(calls, rounds=rounds)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a ``torch.compile`` wrapper, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def run_once(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the model on the inputs.

    Raises:
        GraphError: If it fails; the message says on which shapes.
    """
    try:
        model(**inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        shapes = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        raise GraphError(
            f"{type(model).__name__}.forward failed on the example inputs {shapes}: {type(error).__name__}: {error}. "
            "Pass example_inputs that the model runs on."
        ) from error


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def speedup(reference: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over rounds of reference time / other time."""
    return median([slow / fast for slow, fast in zip(reference, other, strict=True)])


def compile_model(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> tuple[nn.Module | None, str | None]:
    """Compile a model for the shapes of the given inputs, with ``torch.compile`` and its inductor back end.

    Args:
        model: Any model in eval mode.
        inputs: Keyword arguments for ``model.forward``, one mapping for each set of shapes.

    Returns:
        ``(compiled, None)``, or ``(None, reason)`` where it cannot be compiled: the caller goes on without it.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and not any(shutil.which(name) for name in CPP_COMPILERS):
        return None, f"torch.compile needs a C++ compiler; none of {', '.join(CPP_COMPILERS)} was found"
    compiled: Any = torch.compile(model, dynamic=False)
    try:
        with torch.no_grad():
            for example in inputs:
                compiled(**example)
    except RuntimeError as error:  # every error of dynamo and inductor is one
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return None, f"torch.compile failed: {type(error).__name__}: {first_line}"
    return compiled, None
