"""Example inputs for any model, made from its forward signature and config."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import GraphError
from hf_compress.graph.capture import evaluating
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

RUNTIME_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
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
        Tensors on the model's device by forward argument; the last text example ends in padding.

    Raises:
        GraphError: If the forward signature has no input that the config describes.
    """
    _require_runnable(model)
    facts = ModelFacts(model, batch_size, length, seed)
    choices = [_settled(facts, make, kind) for kind, make in _MEDIA.items()]
    placeholders = {kind: count for (_, count), kind in zip(choices, _MEDIA, strict=True) if count}
    fixed = {name: make(facts) for name, make in SIMPLE_MAKERS.items() if facts.takes(name)}
    fixed |= TextMaker(facts, placeholders).make()
    candidates = [
        _finished(facts, {**fixed, **{name: value for part in parts for name, value in part.items()}})
        for parts in product(*(variants for variants, _ in choices))
    ]
    if not any(isinstance(value, Tensor) for value in candidates[0].values()):
        known = sorted({*TEXT_ARGUMENTS, *MEDIA_ARGUMENTS})
        raise GraphError(
            f"{type(model).__name__}.forward takes none of {', '.join(known)}, or its config sets no sizes for them; "
            "pass example_inputs, a dict of keyword arguments that the model runs on."
        )
    return candidates[0] if len(candidates) == 1 else _first_that_runs(model, candidates)


_MEDIA: dict[str, Variants] = {"image": image_variants, "audio": audio_variants, "series": series_variants}


def _require_runnable(model: nn.Module) -> None:
    if not hasattr(model, "config"):
        raise GraphError(
            f"{type(model).__name__} has no config to make example inputs from; pass example_inputs, a dict of keyword "
            "arguments that it runs on."
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise GraphError(f"{type(model).__name__} is on the meta device and cannot be run; load its weights first.")


def _finished(facts: ModelFacts, inputs: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Order arguments as in the signature, on the model's device and in its dtype."""
    floating = next((p for p in facts.model.parameters() if p.is_floating_point()), torch.empty(0))
    finished: dict[str, Any] = {}
    for name in facts.arguments:
        value = inputs.get(name)
        if value is not None:
            finished[name] = value.to(floating.device, floating.dtype if value.is_floating_point() else None)
    if finished and facts.takes("use_cache"):
        finished["use_cache"] = False
    return finished


def _settled(facts: ModelFacts, make: Variants, kind: str) -> tuple[list[dict[str, Tensor]], int]:
    """Return the variants that are still open, and how many placeholder tokens an example needs for them.

    A model whose text holds placeholders turns an image into embeddings in a method of its own, which tells a
    layout that fits from one that does not, and how many embeddings there are.
    """
    variants = list(make(facts))
    method = _feature_method(facts.model, kind)
    if not variants or method is None or placeholder_id(facts, kind) is None:
        return (variants[:1] if kind == "image" else variants) or [{}], 0
    failures = []
    for variant in variants:
        accepted = inspect.signature(method).parameters
        given = {name: value for name, value in _finished(facts, variant).items() if name in accepted}
        try:
            with undisturbed(facts.model):
                rows = feature_rows(method(**given))
        except RUNTIME_ERRORS as error:
            failures.append(f"{type(error).__name__}: {error}")
            continue
        return [variant], rows // facts.batch_size
    warnings.warn(
        f"{type(facts.model).__name__}: no layout of {', '.join(variants[0])} worked ({failures[0]}); the example "
        f"inputs leave the {kind} out, and what reads it is not analyzed. Pass example_inputs to include it.",
        stacklevel=3,
    )
    return [{}], 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode; its modes and the random state stay as they were."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), evaluating(model):
        yield


def _feature_method(model: Any, kind: str) -> Callable[..., Any] | None:
    for owner in (model, getattr(model, "base_model", None), getattr(model, "model", None)):
        method = getattr(owner, f"get_{kind}_features", None)
        if method is not None:
            return method  # type: ignore[no-any-return]
    return None


def _first_that_runs(model: nn.Module, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first candidate on which the model runs; the likeliest if it runs on none, so that its error shows."""
    for inputs in candidates:
        try:
            with undisturbed(model):
                model(**inputs)
        except RUNTIME_ERRORS:
            continue
        return inputs
    return candidates[0]
