"""What a model's forward signature, config and embeddings say about the inputs it takes."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

SPECIAL_SUFFIXES = ("_token_id", "_token_ids", "_token_index", "_token_idx")
MAX_TOKEN_ID = 1000
"""Random tokens stay below this id: more would only widen the range."""

MIN_RESERVED_POSITIONS = 2
"""RoBERTa-like models start counting positions after the padding id."""

KINDS = {"vision": ("vision", "image", "vit", "visual"), "audio": ("audio", "speech", "sound", "acoustic")}
"""How fields that hold the config of a modality are called."""


class ModelFacts:
    """Answers questions about the inputs of ``model``; makes no tensor but random ones.

    Args:
        model: A model with a config.
        batch_size: Number of examples.
        length: Tokens per text example.
        seed: Seed of a private generator.
    """

    def __init__(self, model: nn.Module, batch_size: int, length: int, seed: int) -> None:
        self.model = model
        self.config: Any = model.config
        self.batch_size = batch_size
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self.arguments = inspect.signature(type(model).forward).parameters
        self.special_ids = set(_special_ids(self.config))

    def takes(self, name: str) -> bool:
        """Whether ``forward`` has an argument of this name."""
        return name in self.arguments

    def requires(self, name: str) -> bool:
        """Whether ``forward`` has an argument of this name without default."""
        return self.takes(name) and self.arguments[name].default is inspect.Parameter.empty

    def lookup(self, *fields: str, kind: str | None = None) -> Any:
        """Return the first of ``fields`` that the config or a nested one sets.

        Args:
            fields: Field names, the best first.
            kind: ``"vision"`` or ``"audio"``: look into nested configs of that modality first.
        """
        configs = sorted(_nested(self.config), key=lambda item: not _is_kind(item[0], kind))
        for field in fields:
            for _, config in configs:
                value = getattr(config, field, None)
                if value is not None:
                    return value
        return None

    def number(self, *fields: str, kind: str | None = None, default: int) -> int:
        """Return the first of ``fields`` that holds an integer (or a list of them: its first), else ``default``."""
        for field in fields:
            value = self.lookup(field, kind=kind)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    def text_config(self, decoder: bool = False) -> Any:
        """Return the config that describes the tokens of ``input_ids``, or of ``decoder_input_ids``."""
        nested = [config for _, config in _nested(self.config)]
        sides: list[dict[str, bool]] = [{"decoder": True} if decoder else {"encoder": True}, {}]
        for side in sides if getattr(self.config, "is_encoder_decoder", False) else sides[1:]:
            try:
                nested.insert(0, self.config.get_text_config(**side))
            except (AttributeError, ValueError):  # several text configs, or a config of another library
                continue
            break
        with_tokens = [config for config in nested if isinstance(getattr(config, "vocab_size", None), int)]
        return (with_tokens or nested)[0]

    def vocabulary(self, decoder: bool = False) -> int | None:
        """Return how many token ids there are; None if the model reads no tokens.

        The rows of the embedding count, too: an index past them is a crash on a GPU, not an exception.
        """
        config = self.text_config(decoder)
        # CANINE reads any code point and hashes it.
        declared = getattr(config, "vocab_size", getattr(config, "num_hash_buckets", None))
        rows = _embedding_rows(self.model, decoder)
        sizes = [size for size in (declared, rows) if isinstance(size, int)]
        return min(sizes) if sizes else None

    def token_id(self, kind: str, decoder: bool = False) -> int | None:
        """Return the id of a special token such as ``"pad"`` that is in the vocabulary."""
        vocabulary = self.vocabulary(decoder) or 0
        configs = [self.text_config(decoder), self.config]
        # The copy that get_text_config makes of one side forgets the token a decoder starts with.
        for config in reversed(configs) if kind == "decoder_start" else configs:
            value = getattr(config, f"{kind}_token_id", None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and 0 <= value < vocabulary:
                return value
        return None

    def max_length(self, decoder: bool = False) -> int | None:
        """Return how many tokens the position table allows; None if there is no limit."""
        config = self.text_config(decoder)
        fields = ("max_target_positions", "max_position_embeddings") if decoder else ("max_position_embeddings",)
        limits = [getattr(config, field, None) for field in (*fields, "n_positions")]
        limit = next((value for value in limits if isinstance(value, int) and value > 0), None)
        if limit is None:
            return None
        reserved = [MIN_RESERVED_POSITIONS]
        for module in self.model.modules():
            offset = getattr(module, "padding_idx", None)
            if isinstance(offset, int) and getattr(module, "num_embeddings", None) == limit:
                reserved.append(offset + 1)
        return max(limit - max(reserved), 1)


def decodes(facts: ModelFacts) -> bool:
    """Whether the model reads ``decoder_input_ids``, not only passes them on to some language models."""
    flags = [getattr(config, "is_encoder_decoder", False) for _, config in _nested(facts.config)]
    return facts.takes("decoder_input_ids") and (any(flags) or not facts.takes("input_ids"))


def noise(facts: ModelFacts, *shape: int) -> Tensor:
    """Return normal noise, one example per batch row."""
    return torch.randn(facts.batch_size, *shape, generator=facts.generator)


def integers(facts: ModelFacts, high: int, *shape: int) -> Tensor:
    """Return random integers in [0, high)."""
    return torch.randint(high, shape, generator=facts.generator)


def _nested(config: Any, name: str = "") -> list[tuple[str, Any]]:
    """List ``config`` and the configs in it, those nearest to the top first, each with its field's name."""
    level, found = [(name, config)], []
    while level:
        found += level
        level = [
            (f"{path}.{field}", value)
            for path, parent in level
            for field, value in vars(parent).items()
            if isinstance(value, PreTrainedConfig)
        ]
    return found


def _is_kind(path: str, kind: str | None) -> bool:
    return kind is not None and any(word in path for word in KINDS[kind])


def _special_ids(config: Any) -> Iterator[int]:
    for _, each in _nested(config):
        for field, value in vars(each).items():
            if field.endswith(SPECIAL_SUFFIXES):
                values = value if isinstance(value, (list, tuple)) else [value]
                yield from (v for v in values if isinstance(v, int))


def _embedding_rows(model: nn.Module, decoder: bool) -> int | None:
    owner: Any = model
    if decoder and hasattr(owner, "get_decoder"):
        owner = owner.get_decoder() or model
    try:
        embedding = owner.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None
