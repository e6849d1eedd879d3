"""What an entry of the zoo is: a transformers class, its sizes, and inputs where the config does not describe them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

Inputs = dict[str, Any]

ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 40,
    "vocab_size": 97,
}
DECODER: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "image_size": 16,
    "patch_size": 4,
}


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every parameter, biases and norms too, values that matter, so that equalities are no accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


@dataclass(frozen=True, eq=False)
class Tiny:
    """Builds one tiny random model; calling it twice gives equal models."""

    name: str
    """Unique in the zoo."""

    model_class: str
    """Name of a class of transformers."""

    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its config class."""

    inputs: Callable[[PreTrainedModel], Inputs] | None = None
    """Makes inputs that the config does not describe; None: ``make_example_inputs`` does."""

    @property
    def __name__(self) -> str:
        """The name, as pytest shows it."""
        return self.name

    def __repr__(self) -> str:
        return self.name

    def __call__(self, **changes: Any) -> PreTrainedModel:
        """Build the model with ``changes`` to its config, such as ``attn_implementation="eager"``."""
        model_class = getattr(transformers, self.model_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return randomize(model_class(model_class.config_class(**{**self.sizes, **changes})))

    def example_inputs(self, model: PreTrainedModel) -> Inputs | None:
        """Return explicit inputs, or None where ``make_example_inputs`` makes them."""
        return None if self.inputs is None else self.inputs(model)


def table(*entries: Tiny) -> dict[str, Tiny]:
    """Return the entries by name.

    Raises:
        ValueError: If two have the same name.
    """
    found: dict[str, Tiny] = {}
    for entry in entries:
        if entry.name in found:
            raise ValueError(f"the zoo has two entries called {entry.name!r}; names must be unique")
        found[entry.name] = entry
    return found


def join(*tables: Mapping[str, Tiny]) -> dict[str, Tiny]:
    """Return all entries of several tables."""
    return table(*(entry for part in tables for entry in part.values()))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return reproducible normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch_size: int = 2, length: int = 11, vocab_size: int = 97, seed: int = 0) -> torch.Tensor:
    """Return reproducible token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocab_size, (batch_size, length), generator=generator)


def text(batch_size: int = 2, length: int = 11) -> Inputs:
    """Return token ids and a mask that pads the last example."""
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": tokens(batch_size, length), "attention_mask": mask}
