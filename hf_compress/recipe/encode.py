"""Texts become what the model reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Value
from transformers import PreTrainedTokenizerBase

from hf_compress.config import DatasetConfig
from hf_compress.errors import ConfigError
from hf_compress.recipe.labels import IGNORED, LABELS
from hf_compress.recipe.splits import Splits, drop_incomplete

DEFAULT_LENGTH = 128
"""Tokens, where the recipe says nothing."""

MAX_REASONABLE = 10**9
"""Tokenizers without a limit have an astronomic one."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the settings of a recipe."""

    tokenizer: PreTrainedTokenizerBase
    config: DatasetConfig

    limit: int | None
    """Tokens that the model can read, or None."""

    def options(self, field: str = "max_length") -> dict[str, Any]:
        """Return how to cut texts.

        Raises:
            ConfigError: If the recipe asks for more tokens than the model can read.
        """
        given = getattr(self.config, field)
        if given is not None and self.limit is not None and given > self.limit:
            raise ConfigError(f"DatasetConfig.{field}: got {given}; allowed: at most {self.limit}, the model's limit.")
        return {"truncation": True, "max_length": given or min(DEFAULT_LENGTH, self.limit or DEFAULT_LENGTH)}


def text_limit(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> int | None:
    """Return how many tokens a model reads at most, or None if nothing says."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    known = [each for each in (tokenizer.model_max_length, positions) if each is not None and 0 < each < MAX_REASONABLE]
    return min(known, default=None)


def encode(splits: Splits, task: str, encoder: Encoder) -> Splits:
    """Tokenize; only columns that the model reads remain.

    Raises:
        ConfigError: If a column is missing or of the wrong type, or no example is long enough to learn from.
    """
    config = encoder.config
    columns = [*config.text_columns, *([config.target_column] if config.target_column else [])]
    splits = drop_incomplete(splits, columns)
    for which, part in splits.named().items():
        for column in columns:
            _check_texts(part.features[column], column, which, words=task == "token-classification")
    rows = _ENCODERS[task]

    def tokenize(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        return rows(encoder, batch)

    parts = [part.map(tokenize, batched=True, remove_columns=part.column_names) for part in splits.named().values()]
    encoded = Splits(parts[0], parts[1], splits.evaluation_name, splits.notes)
    return _drop_short(encoded) if task == "causal-lm" else encoded


def _check_texts(feature: Any, column: str, which: str, *, words: bool) -> None:
    inner = getattr(feature, "feature", None) if words else feature
    if not isinstance(inner, Value) or inner.dtype not in ("string", "large_string"):
        wanted = "lists of words" if words else "texts"
        raise ConfigError(f"dataset: column {column!r} of the {which} data holds {feature}; {wanted} are needed.")


def _drop_short(splits: Splits) -> Splits:
    """Leave texts of one token out: a causal language model has nothing to predict in them."""
    parts = []
    notes = list(splits.notes)
    for which, part in splits.named().items():
        long = [i for i, ids in enumerate(part["input_ids"]) if len(ids) > 1]
        if not long:
            raise ConfigError(f"dataset: no text of the {which} data has two tokens or more: nothing to learn.")
        if len(long) < len(part):
            notes.append(f"{len(part) - len(long):,} {which} examples of less than two tokens were left out")
        parts.append(part.select(long))
    return Splits(parts[0], parts[1], splits.evaluation_name, tuple(notes))


def _classify(encoder: Encoder, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    texts = [batch[column] for column in encoder.config.text_columns]
    return {**encoder.tokenizer(*texts, **encoder.options()), LABELS: batch[LABELS]}


def _classify_words(encoder: Encoder, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The first token of a word has its label; the others, and special tokens, have none."""
    (column,) = encoder.config.text_columns
    encoded = encoder.tokenizer(batch[column], is_split_into_words=True, **encoder.options())
    labels = []
    for row, of_words in enumerate(batch[LABELS]):
        if len(of_words) != len(batch[column][row]):
            raise ConfigError(
                f"dataset: {len(batch[column][row])} words in {column!r} have {len(of_words)} labels: "
                f"{batch[column][row][:5]}; there must be one for each word."
            )
        words = encoded.word_ids(row)
        firsts = [None if i and words[i - 1] == word else word for i, word in enumerate(words)]
        labels.append([IGNORED if word is None else of_words[word] for word in firsts])
    return {**encoded, LABELS: labels}


def _continue(encoder: Encoder, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Labels are the tokens themselves; the model shifts them."""
    (column,) = encoder.config.text_columns
    encoded = encoder.tokenizer(batch[column], **encoder.options())
    return {**encoded, LABELS: [list(ids) for ids in encoded["input_ids"]]}


def _translate(encoder: Encoder, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    (column,) = encoder.config.text_columns
    encoded = encoder.tokenizer(batch[column], **encoder.options())
    targets = batch[str(encoder.config.target_column)]
    encoded_targets = encoder.tokenizer(text_target=targets, **encoder.options("max_target_length"))
    return {**encoded, LABELS: encoded_targets["input_ids"]}


_ENCODERS: dict[str, Callable[[Encoder, Mapping[str, Sequence[Any]]], dict[str, Any]]] = {
    "text-classification": _classify,
    "token-classification": _classify_words,
    "causal-lm": _continue,
    "seq2seq-lm": _translate,
}
