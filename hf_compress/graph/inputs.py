"""Example inputs for any model, made from its signature and config."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import GraphError

DEFAULT_LENGTH = 11
"""Tokens per example: small, and no size that models use, so that nothing fits by accident."""

PADDED_TOKENS = 3
"""How many tokens of the last example are padding."""


def make_example_inputs(
    model: nn.Module, batch_size: int = 2, length: int = DEFAULT_LENGTH, seed: int = 0
) -> dict[str, Any]:
    """Return keyword arguments on which ``model.forward`` runs.

    Args:
        model: A transformers model.
        batch_size: Number of examples.
        length: Tokens per example, for text; cut to what the model's positions allow.
        seed: Seed of a private generator: the global random state stays as it was.

    Returns:
        Tensors on the model's device (the CPU for a model on the meta device) by forward argument; the last text
        example ends in padding.

    Raises:
        GraphError: If the forward signature has no input that the config describes.
    """
    if not hasattr(model, "config"):
        raise GraphError(
            f"{type(model).__name__} has no config to make example inputs from; pass example_inputs, a dict of keyword "
            "arguments that it runs on."
        )
    parameter = next(model.parameters())
    device = "cpu" if parameter.is_meta else parameter.device
    maker = _Maker(model.config, batch_size, length, seed)
    inputs: dict[str, Any] = {}
    for name in _forward_names(model):
        make = _MAKERS.get(name)
        value = make(maker) if make is not None else None
        if value is not None:
            dtype = parameter.dtype if value.is_floating_point() else value.dtype
            inputs[name] = value.to(device, dtype)
    if not inputs:
        raise GraphError(
            f"{type(model).__name__}.forward takes none of {', '.join(sorted(_MAKERS))}; pass example_inputs, a dict "
            "of keyword arguments that the model runs on."
        )
    if "use_cache" in _forward_names(model) or "input_ids" in inputs:
        inputs["use_cache"] = False
    if not _accepts(model, "use_cache"):
        inputs.pop("use_cache", None)
    return inputs


def _forward_names(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)


def _accepts(model: nn.Module, name: str) -> bool:
    return name in _forward_names(model)


class _Maker:
    """Knows the sizes; one method for each kind of input."""

    def __init__(self, config: Any, batch_size: int, length: int, seed: int) -> None:
        self.config = config
        self.text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.batch_size = batch_size
        limit = getattr(self.text, "max_position_embeddings", None)
        # RoBERTa-like models start counting positions after the padding id.
        self.length = min(length, limit - 2) if isinstance(limit, int) and limit > 4 else length
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self) -> Tensor | None:
        vocabulary = getattr(self.text, "vocab_size", None)
        if not isinstance(vocabulary, int):
            return None
        special = {i for kind in ("pad", "bos", "eos", "cls", "sep", "mask") for i in self._ids_of(kind)}
        allowed = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special])
        picks = torch.randint(len(allowed), (self.batch_size, self.length), generator=self.generator)
        tokens = allowed[picks]
        padding, end = ([i for i in self._ids_of(kind) if 0 <= i < vocabulary] for kind in ("pad", "eos"))
        if padding:
            tokens[-1, self.length - self._num_padded() :] = padding[0]
        if end:  # some heads read the state at the end-of-sequence token
            tokens[:-1, -1] = end[0]
            tokens[-1, self.length - self._num_padded() - 1] = end[0]
        return tokens

    def _ids_of(self, kind: str) -> list[int]:
        """One id, several (Llama 3 ends texts with any of three), or none."""
        value = getattr(self.text, f"{kind}_token_id", None)
        values = value if isinstance(value, list | tuple) else [value]
        return [i for i in values if isinstance(i, int)]

    def attention_mask(self) -> Tensor | None:
        if not isinstance(getattr(self.text, "vocab_size", None), int):
            return None
        mask = torch.ones(self.batch_size, self.length, dtype=torch.long)
        mask[-1, self.length - self._num_padded() :] = 0
        return mask

    def _num_padded(self) -> int:
        return min(PADDED_TOKENS, self.length - 2) if self.batch_size > 1 and self.length > 2 else 0

    def token_types(self) -> Tensor | None:
        if getattr(self.config, "type_vocab_size", 0) < 2:
            return None
        types = torch.zeros(self.batch_size, self.length, dtype=torch.long)
        types[:, self.length // 2 :] = 1
        return types

    def decoder_tokens(self) -> Tensor | None:
        return self.tokens() if getattr(self.config, "is_encoder_decoder", False) else None

    def pixels(self) -> Tensor | None:
        vision = getattr(self.config, "vision_config", self.config)
        size = getattr(vision, "image_size", None)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return self._noise(getattr(vision, "num_channels", 3), height, width)

    def audio_features(self) -> Tensor | None:
        bins, length = getattr(self.config, "num_mel_bins", None), getattr(self.config, "max_source_positions", None)
        return None if bins is None or length is None else self._noise(bins, 2 * length)

    def waveform(self) -> Tensor | None:
        return self._noise(4000) if hasattr(self.config, "conv_stride") else None

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(self.batch_size, *shape, generator=self.generator)


_MAKERS: dict[str, Callable[[_Maker], Tensor | None]] = {
    "input_ids": _Maker.tokens,
    "attention_mask": _Maker.attention_mask,
    "token_type_ids": _Maker.token_types,
    "decoder_input_ids": _Maker.decoder_tokens,
    "pixel_values": _Maker.pixels,
    "input_features": _Maker.audio_features,
    "input_values": _Maker.waveform,
}
