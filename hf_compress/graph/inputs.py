"""Example inputs for any model, made from its forward signature and config."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import GraphError
from hf_compress.graph.capture import evaluating
from hf_compress.graph.fake import fake_tensors, has_no_weights
from hf_compress.graph.input_facts import ModelFacts
from hf_compress.graph.input_media import (
    MEDIA_ARGUMENTS,
    SIMPLE_MAKERS,
    audio_variants,
    feature_rows,
    image_variants,
    series_variants,
)
from hf_compress.graph.input_text import TEXT_ARGUMENTS, TextMaker, placeholder_id

DEFAULT_LENGTH = 11
"""Tokens per example: small, and no size that models use, so that nothing fits by accident."""

RUNTIME_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, NameError, AssertionError,
)  # fmt: skip
"""What a forward pass raises on inputs of the wrong layout."""

Variants = Callable[[ModelFacts], Iterator[dict[str, Tensor]]]


def make_example_inputs(
    model: nn.Module, batch_size: int = 2, length: int = DEFAULT_LENGTH, seed: int = 0
) -> dict[str, Any]:
    """Return keyword arguments on which ``model.forward`` runs.

    Where text holds placeholders for an image or a sound, the features that stand for them are computed to count
    them; where the layout of an input is open, the model is run to find out.

    Args:
        model: A transformers model.
        batch_size: Number of examples.
        length: Tokens per example, for text; cut to what the model's positions allow. Placeholders come on top.
        seed: Seed of a private generator: the global random state stays as it was.

    Returns:
        Tensors on the model's device (the CPU for a model on the meta device) by forward argument; the last text
        example ends in padding.

    Raises:
        GraphError: If the forward signature has no input that the config describes.

    Warns:
        UserWarning: If an image or a sound was left out because no known layout fits.
    """
    _require_runnable(model)
    facts = ModelFacts(model, batch_size, length, seed)
    fixed = {name: make(facts) for name, make in SIMPLE_MAKERS.items() if facts.takes(name)}
    candidates = []
    for options in product(*(_options(facts, make, kind, fixed) for make, kind in _MEDIA)):
        placeholders = {kind: count for (_, count), (_, kind) in zip(options, _MEDIA, strict=True) if count}
        media = {name: value for variant, _ in options for name, value in variant.items()}
        candidates.append(_finished(facts, {**fixed, **TextMaker(facts, placeholders).make(), **media}))
    if not any(isinstance(value, Tensor) for value in candidates[0].values()):
        known = sorted({*TEXT_ARGUMENTS, *MEDIA_ARGUMENTS})
        raise GraphError(
            f"{type(model).__name__}.forward takes none of {', '.join(known)}, or its config sets no sizes for them; "
            "pass example_inputs, a dict of keyword arguments that the model runs on."
        )
    return candidates[0] if len(candidates) == 1 else _first_that_runs(model, candidates)


_MEDIA: list[tuple[Variants, str]] = [
    (image_variants, "image"),
    (audio_variants, "audio"),
    (series_variants, "series"),
]
"""What makes the layouts of an input, and how its placeholders in the text are called."""


def _require_runnable(model: nn.Module) -> None:
    if not hasattr(model, "config"):
        raise GraphError(
            f"{type(model).__name__} has no config to make example inputs from; pass example_inputs, a dict of keyword "
            "arguments that it runs on."
        )


def _finished(facts: ModelFacts, inputs: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Order arguments as in the signature, on the model's device and in its dtype."""
    floating = next((p for p in facts.model.parameters() if p.is_floating_point()), torch.empty(0))
    device = "cpu" if floating.is_meta else floating.device
    finished: dict[str, Any] = {}
    for name in facts.arguments:
        value = inputs.get(name)
        if value is not None:
            finished[name] = value.to(device, floating.dtype if value.is_floating_point() else None)
    if finished and facts.takes("use_cache"):
        finished["use_cache"] = False
    return finished


def _options(
    facts: ModelFacts, make: Variants, kind: str, others: Mapping[str, Tensor | None]
) -> list[tuple[dict[str, Tensor], int]]:
    """Return the layouts that are still open, each with the number of placeholders an example needs for it.

    A model whose text holds placeholders turns an image into embeddings in a method of its own, which tells a
    layout that fits from one that does not, and how many embeddings there are.
    """
    variants = list(make(facts))
    if not variants:
        return [({}, 0)]
    if placeholder_id(facts, kind) is None:
        return [(variant, 0) for variant in variants]
    method = _feature_method(facts.model, kind, set(variants[0]))
    if method is None:  # the model puts all embeddings in the place of one token
        return [(variant, 1) for variant in variants]
    failures = []
    for variant in variants:
        accepted = inspect.signature(method).parameters
        given = {name: value for name, value in _finished(facts, {**others, **variant}).items() if name in accepted}
        try:
            with undisturbed(facts.model, given) as usable:
                rows = feature_rows(method(**usable))
        except RUNTIME_ERRORS as error:
            failures.append(f"{type(error).__name__}: {error}")
            continue
        return [(variant, rows // facts.batch_size)]
    warnings.warn(
        f"{type(facts.model).__name__}: no layout of {', '.join(variants[0])} worked ({failures[0]}); the example "
        f"inputs leave the {kind} out, and what reads it is not analyzed. Pass example_inputs to include it.",
        stacklevel=4,
    )
    return [({}, 0)]


def _feature_method(model: nn.Module, kind: str, inputs: set[str]) -> Callable[..., Any] | None:
    """Return the method, of the model or what it wraps, that names one of ``inputs`` among its arguments."""
    for module in model.modules():
        method = getattr(module, f"get_{kind}_features", None)
        if method is not None and inputs & set(inspect.signature(method).parameters):
            return method  # type: ignore[no-any-return]
    return None


@contextmanager
def undisturbed(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a model in eval mode; its modes and the random state stay as they were.

    Yields:
        The inputs; fake ones for a model without weights, which runs on fake tensors meanwhile.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        given = dict(inputs)
        if has_no_weights(model):
            given = stack.enter_context(fake_tensors(model, inputs))
        stack.enter_context(evaluating(model))
        yield given


def _first_that_runs(model: nn.Module, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first candidate on which the model runs; the likeliest if it runs on none, so that its error shows."""
    for inputs in candidates:
        try:
            with undisturbed(model, inputs) as usable:
                model(**usable)
        except RUNTIME_ERRORS:
            continue
        return inputs
    return candidates[0]
