"""Whether a model says something else while it trains than when it is evaluated."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hf_compress.callbacks.preview import unchanged
from hf_compress.instruments.attach import attachment_of

_READ_WHILE_RUNNING = "layerdrop"
"""Models ask their config for it in each pass; other kinds of dropout are copied into modules."""


def differs_in_training(model: PreTrainedModel, batch: Mapping[str, Any] | None) -> bool:
    """Return whether something is attached to a model, or it drops a part of what it computes while it trains.

    What modules hold says so; where they hold nothing, a trial does, which also sees what a model reads from its config
    and BatchNorm.

    Args:
        model: The model, without wrappers.
        batch: Of training, as the model gets it; None if none may be taken, so that the config has to be believed.
    """
    if any(attachment_of(module) is not None or _drops(module) for module in model.modules()):
        return True
    config = model.config.get_text_config().to_dict() | model.config.to_dict()
    rates = {name: value for name, value in config.items() if "drop" in name and _is_rate(value)}
    if batch is None or any(_READ_WHILE_RUNNING in name for name in rates):
        return bool(rates)
    inputs = {name: value for name, value in batch.items() if name != "labels" or model.config.is_encoder_decoder}
    with torch.no_grad(), unchanged(model), torch.random.fork_rng():
        trained, evaluated = (list(_numbers(model.train(mode)(**inputs))) for mode in (True, False))
    return not all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))


def _drops(module: nn.Module) -> bool:
    """Return whether a module holds the rate of a dropout: its own, or one for a function that it calls."""
    rates = {name: value for name, value in vars(module).items() if "drop" in name and name != "training"}
    if "drop" in type(module).__name__.lower():
        rates["p"] = getattr(module, "p", None)
    return any(_is_rate(value) for value in rates.values())


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _numbers(outputs: Any) -> Iterator[Tensor]:
    yield from (each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.is_floating_point())
