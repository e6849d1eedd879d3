"""Which tokens a corpus uses."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers.utils import logging

from hf_compress.errors import ShrinkError

BATCH_SIZE = 1000
SAMPLE_SIZE = 256
"""Texts that are remembered for the check, beside as many of those that hold unknown words."""

Text = str | tuple[str, str]
"""A text, or a pair of texts that the tokenizer sees together."""


@dataclass
class Usage:
    """What the tokenizer made of a corpus."""

    counts: Counter[int] = field(default_factory=Counter)
    """Occurrences by token id, special tokens that the tokenizer adds included."""

    num_texts: int = 0
    """Texts (or pairs) read."""

    unknown: set[str] = field(default_factory=set)
    """Words, normalized as the tokenizer does, that became the unknown token."""

    sample: list[Text] = field(default_factory=list)
    """Some of the texts, for the check; those with unknown words first."""


def plain_backend(backend: Tokenizer) -> Tokenizer:
    """Return a copy that neither pads nor truncates; the original keeps its settings."""
    duplicate = Tokenizer.from_str(backend.to_str())
    duplicate.no_padding()
    duplicate.no_truncation()
    duplicate.encode_special_tokens = backend.encode_special_tokens
    return duplicate


def count_tokens(backend: Tokenizer, texts: Iterable[Text], unknown_id: int | None) -> Usage:
    """Tokenize every text and count.

    Args:
        backend: A tokenizer without padding and truncation.
        texts: Texts or pairs of texts.
        unknown_id: Id of the token whose words are to be collected, or None to collect nothing.

    Raises:
        ShrinkError: If there is no text, or something is no text.
    """
    usage, generator = Usage(), random.Random(0)
    reservoir: list[Text] = []
    rare: list[Text] = []
    bars: Any = logging
    for batch in bars.tqdm(_batches(_checked(texts)), desc="Counting tokens", unit_scale=BATCH_SIZE, unit=" texts"):
        encode = backend.encode_batch_fast if unknown_id is None else backend.encode_batch
        for text, encoding in zip(batch, encode(batch), strict=True):
            ids = encoding.ids
            usage.counts.update(ids)
            usage.num_texts += 1
            if unknown_id is not None and unknown_id in ids:
                usage.unknown.update(_unknown_words(backend, text, encoding, unknown_id))
                if len(rare) < SAMPLE_SIZE:
                    rare.append(text)
                    continue
            if len(reservoir) < SAMPLE_SIZE:
                reservoir.append(text)
            elif (place := generator.randrange(usage.num_texts)) < SAMPLE_SIZE:
                reservoir[place] = text
    if usage.num_texts == 0:
        raise ShrinkError(
            "prune_vocabulary: texts is empty, so every token would go. Pass the texts that the model will see; an "
            "iterator that was read before is empty, too."
        )
    usage.sample = [*rare, *reservoir]
    return usage


def _checked(texts: Iterable[Text]) -> Iterator[Text]:
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise ShrinkError(
            f"prune_vocabulary: texts is a {type(texts).__name__}; allowed: an iterable of strings or of pairs of "
            'strings, such as a list, a generator or a column of a data set (dataset["text"]).'
        )
    for position, text in enumerate(texts):
        pair = isinstance(text, list | tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not pair:
            raise ShrinkError(
                f"prune_vocabulary: texts[{position}] is {str(text)[:60]!r} ({type(text).__name__}); allowed: a string "
                'or a pair of strings. Pass one column of a data set, such as dataset["text"].'
            )
        try:
            "".join(text).encode()
        except UnicodeEncodeError as error:
            raise ShrinkError(
                f"prune_vocabulary: texts[{position}] cannot be written as UTF-8 ({error.reason}), so no tokenizer "
                'reads it. Mend it with text.encode("utf-8", "replace").decode(), or leave it out.'
            ) from error
        yield text if isinstance(text, str) else (text[0], text[1])


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    while batch := list(itertools.islice(texts, BATCH_SIZE)):
        yield batch


def _unknown_words(backend: Tokenizer, text: Text, encoding: Encoding, unknown_id: int) -> Iterator[str]:
    for position, token_id in enumerate(encoding.ids):
        sequence = encoding.token_to_sequence(position)
        if token_id != unknown_id or sequence is None:
            continue
        start, end = encoding.offsets[position]
        word = (text if isinstance(text, str) else text[sequence])[start:end]
        if backend.normalizer is not None:
            word = backend.normalizer.normalize_str(word)
        if backend.pre_tokenizer is None:
            yield word
        else:
            yield from (piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word))
