"""Texts become tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Value
from transformers import PreTrainedTokenizerBase

from hf_compress.config import DatasetConfig
from hf_compress.errors import ConfigError
from hf_compress.recipe.splits import Splits, drop_incomplete

DEFAULT_LENGTH = 128
"""Tokens, where the recipe says nothing."""

MAX_REASONABLE = 10**9
"""Tokenizers without a limit have an astronomic one."""

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer with the settings of a recipe."""

    tokenizer: PreTrainedTokenizerBase
    data: DatasetConfig

    limit: int | None
    """Tokens that the model can read, or None."""

    def max_length(self, field: str = "max_length") -> int:
        """Return how many tokens a text may have.

        Raises:
            ConfigError: If the recipe asks for more tokens than the model can read.
        """
        given: int | None = getattr(self.data, field)
        if given is not None and self.limit is not None and given > self.limit:
            raise ConfigError(f"DatasetConfig.{field}: got {given}; allowed: at most {self.limit}, the model's limit.")
        return given or min(DEFAULT_LENGTH, self.limit or DEFAULT_LENGTH)

    def options(self, field: str = "max_length") -> dict[str, Any]:
        """Return how to cut texts, see ``max_length``."""
        return {"truncation": True, "max_length": self.max_length(field)}


def text_limit(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> int | None:
    """Return how many tokens a model reads at most, or None if nothing says."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    known = [each for each in (tokenizer.model_max_length, positions) if each is not None and 0 < each < MAX_REASONABLE]
    return min(known, default=None)


def text_columns(data: DatasetConfig) -> list[str]:
    """Return the columns that hold texts, the one of the target last."""
    return [*data.text_columns, *([data.target_column] if data.target_column else [])]


def encode_texts(
    splits: Splits, data: DatasetConfig, rows: Callable[[Columns], Columns], *, words: bool = False
) -> Splits:
    """Tokenize; only columns that the model reads remain.

    Args:
        splits: Data that have the text columns; rows without a text are left out.
        data: Names the columns.
        rows: Makes columns of what the model reads from columns of texts.
        words: Whether texts are lists of words.

    Raises:
        ConfigError: If a column is missing or of the wrong type.
    """
    columns = text_columns(data)
    splits = drop_incomplete(splits, columns)
    for which, part in splits.named().items():
        for column in columns:
            _check_texts(part.features[column], column, which, words)
    return splits.map(lambda part: part.map(rows, batched=True, remove_columns=part.column_names))


def _check_texts(feature: Any, column: str, which: str, words: bool) -> None:
    inner = getattr(feature, "feature", None) if words else feature
    if not isinstance(inner, Value) or inner.dtype not in ("string", "large_string"):
        wanted = "lists of words" if words else "texts"
        raise ConfigError(f"dataset: column {column!r} of the {which} data holds {feature}; {wanted} are needed.")
