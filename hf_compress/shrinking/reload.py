"""Check that a model built anew from its config computes the same: what a module remembers is not stored."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_compress.errors import CompressionError
from hf_compress.shrinking.sizes import Agrees, left_out_when_saved
from hf_compress.shrinking.verify import FORWARD_ERRORS, TOLERANCES, in_full_precision, relative_error, run


def reload_check(model: PreTrainedModel, inputs: Mapping[str, Any], dense: Callable[[], PreTrainedModel]) -> Agrees:
    """Return a function that loads ``model`` in memory with a config, and says whether the outputs stay the same.

    Constructors derive numbers from sizes and keep them wherever they like: in private attributes, lists, closures.
    A copy has the old ones, which are right; a model built from new sizes has others.

    Args:
        model: A shrunk model.
        inputs: Keyword arguments of its forward pass.
        dense: Returns the model of the original sizes. If that cannot be loaded either, nothing is asked.
    """
    expected = run(in_full_precision(model), inputs)
    loads: list[bool] = []

    def agrees(config: PretrainedConfig) -> bool:
        if _loads_the_same(model, config, inputs, expected):
            return True
        if not loads:
            original = dense()
            outputs = run(in_full_precision(original), inputs)
            loads.append(_loads_the_same(original, original.config, inputs, outputs))
        return not loads[0]

    return agrees


def _loads_the_same(
    model: PreTrainedModel, config: PretrainedConfig, inputs: Mapping[str, Any], expected: list[Tensor]
) -> bool:
    stored = copy.deepcopy(config)
    stored.architectures = [type(model).__name__]  # as saving does
    absent = left_out_when_saved(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
    kernels = {"attn_implementation": config._attn_implementation, "experts_implementation": _experts(config)}
    try:
        with _silent():
            loaded: Any = type(model).from_pretrained(
                None, config=stored, state_dict=state, dtype=model.dtype, **kernels
            )
        actual = run(in_full_precision(loaded.to(model.device)), inputs)
    except (*FORWARD_ERRORS, OSError, ImportError, CompressionError):
        return False
    if len(actual) != len(expected):
        return False
    allowed = TOLERANCES.get(model.dtype, 1e-5)
    return all(relative_error(a, b) <= allowed for a, b in zip(expected, actual, strict=True))


def _experts(config: PretrainedConfig) -> str | None:
    """Return how experts are computed, which configs do not store."""
    found: str | None = getattr(config, "_experts_implementation", None)
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from reporting on models that are only tried."""
    transformers: Any = logging
    verbosity, bars = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity(CRITICAL)
    transformers.disable_progress_bar()
    try:
        yield
    finally:
        transformers.set_verbosity(verbosity)
        if bars:
            transformers.enable_progress_bar()
