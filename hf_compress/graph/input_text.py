"""Token ids for any model, and the masks and types that go with them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compress.graph.input_facts import MAX_TOKEN_ID, ModelFacts, decodes, integers

PADDED_TOKENS = 3
"""How many tokens of the last example are padding."""

NUM_CHOICES = 3
MIN_LENGTH_FOR_SEGMENTS = 8
MEDIA_TYPES = {"image": 1, "video": 2, "audio": 3}
"""What ``mm_token_type_ids`` calls the modality of a placeholder."""


class TextMaker:
    """Makes the text arguments of one example batch.

    Args:
        facts: The model and the sizes asked for.
        placeholders: How many placeholder tokens each example needs for its image, video or audio, by modality.
    """

    def __init__(self, facts: ModelFacts, placeholders: Mapping[str, int]) -> None:
        self.facts = facts
        self.placeholders = placeholders
        self.choices = NUM_CHOICES if takes_choices(facts) else 1
        self.rows = facts.batch_size * self.choices
        length, limit = facts.length, facts.max_length()
        room = length if limit is None else min(length, limit - sum(placeholders.values()))
        self.length = max(room, 2) + sum(placeholders.values())

    def make(self) -> dict[str, Tensor]:
        """Return the text arguments that the model takes; none if it reads no tokens."""
        made: dict[str, Tensor] = {}
        if self.facts.takes("input_ids") and self.facts.vocabulary() is not None:
            for name, maker in _WITH_TOKENS.items():
                value = maker(self) if self.facts.takes(name) else None
                if value is not None:
                    made[name] = value.view(-1, self.choices, *value.shape[1:]) if self.choices > 1 else value
        if decodes(self.facts) and self.facts.vocabulary(decoder=True) is not None:
            made["decoder_input_ids"] = self._decoder_tokens()
        return made

    def tokens(self) -> Tensor:
        """Return ids [rows, length]: start, placeholders, random text with separators, end, padding in the last row."""
        facts, ids = self.facts, _random_tokens(self.facts, self.rows, self.length)
        start = 1 + sum(self.placeholders.values())
        position = 1
        for kind, count in self.placeholders.items():
            ids[:, position : position + count] = placeholder_id(facts, kind) or 0
            position += count
        question = facts.token_id("question")
        if question is not None:
            ids[:, start] = question
        separator, end = facts.token_id("sep"), facts.token_id("eos")
        if separator is not None and self.length - start >= MIN_LENGTH_FOR_SEGMENTS - 1:
            # Question-answering heads look for the end of the question: one, then two separators, then one at the end.
            ids[:, start + 1 : start + 3] = separator
        _mark_ends(facts, ids, end if separator is None else separator, num_padded(facts, self.length))
        return ids

    def attention_mask(self) -> Tensor:
        """Return ones [rows, length], with zeros at the padding."""
        mask = torch.ones(self.rows, self.length, dtype=torch.long)
        mask[-1, self.length - num_padded(self.facts, self.length) :] = 0
        return mask

    def token_types(self) -> Tensor | None:
        """Return segment ids; where the model has no segments but placeholders, 1 marks those."""
        types = torch.zeros(self.rows, self.length, dtype=torch.long)
        if getattr(self.facts.text_config(), "type_vocab_size", 0) >= 2:
            types[:, self.length // 2 :] = 1
            return types
        if not self.placeholders:
            return None
        types[:, 1 : 1 + sum(self.placeholders.values())] = 1
        return types

    def media_types(self) -> Tensor:
        """Return the modality of each token: 0 for text."""
        types = torch.zeros(self.rows, self.length, dtype=torch.long)
        position = 1
        for kind, count in self.placeholders.items():
            types[:, position : position + count] = MEDIA_TYPES[kind]
            position += count
        return types

    def boxes(self) -> Tensor | None:
        """Return where each token stands on its page: left, top, right, bottom."""
        largest = self.facts.lookup("max_2d_position_embeddings")
        if not isinstance(largest, int):
            if not (self.facts.requires("bbox") or self.facts.lookup("dim_bbox")):
                return None
            corners = torch.rand(self.rows, self.length, 4, generator=self.facts.generator)
        else:
            corners = integers(self.facts, largest // 2, self.rows, self.length, 4)
        corners[..., 2:] += corners[..., :2]
        return corners

    def languages(self) -> Tensor | None:
        """Return the first language for each example, for models with weights per language."""
        if not self.facts.lookup("languages"):
            return None
        return torch.zeros(self.rows, dtype=torch.long)

    def _decoder_tokens(self) -> Tensor:
        facts, limit = self.facts, self.facts.max_length(decoder=True)
        length = facts.length if limit is None else min(facts.length, limit)
        ids = _random_tokens(facts, facts.batch_size, length, decoder=True)
        _mark_ends(facts, ids, facts.token_id("eos", decoder=True), num_padded(facts, length), decoder=True)
        return ids


_WITH_TOKENS: dict[str, Callable[[TextMaker], Tensor | None]] = {
    "input_ids": TextMaker.tokens,
    "attention_mask": TextMaker.attention_mask,
    "token_type_ids": TextMaker.token_types,
    "mm_token_type_ids": TextMaker.media_types,
    "bbox": TextMaker.boxes,
    "lang_ids": TextMaker.languages,
}

TEXT_ARGUMENTS = (*_WITH_TOKENS, "decoder_input_ids")


def takes_choices(facts: ModelFacts) -> bool:
    """Whether ``input_ids`` are [batch, choices, length].

    Neither signature nor config tells multiple-choice heads apart; their forward code counts the choices.
    """
    code: Any = getattr(inspect.unwrap(type(facts.model).forward), "__code__", None)
    return code is not None and "num_choices" in code.co_varnames


def placeholder_id(facts: ModelFacts, kind: str) -> int | None:
    """Return the token that stands for a piece of an image, video or audio; None if text holds no such tokens."""
    value = facts.lookup(f"{kind}_token_id", f"{kind}_token_index")
    vocabulary = facts.vocabulary()
    return value if isinstance(value, int) and vocabulary is not None and 0 <= value < vocabulary else None


def num_padded(facts: ModelFacts, length: int) -> int:
    """Return how many tokens of the last example are padding."""
    return min(PADDED_TOKENS, length - 2) if facts.batch_size > 1 and length > 2 else 0


def _random_tokens(facts: ModelFacts, rows: int, length: int, decoder: bool = False) -> Tensor:
    vocabulary = min(facts.vocabulary(decoder) or 1, MAX_TOKEN_ID)
    plain = [i for i in range(vocabulary) if i not in facts.special_ids] or list(range(vocabulary))
    return torch.tensor(plain)[integers(facts, len(plain), rows, length)]


def _mark_ends(facts: ModelFacts, ids: Tensor, end: int | None, padded: int, decoder: bool = False) -> None:
    """Put start, end and padding tokens in place: some heads read the state at the start or at the end token."""
    kinds = ("decoder_start", "bos") if decoder else ("cls", "bos")
    start = next((i for i in (facts.token_id(kind, decoder) for kind in kinds) if i is not None), None)
    padding, length = facts.token_id("pad", decoder), ids.shape[1]
    if start is not None and (decoder or start not in (end, padding)):
        ids[:, 0] = start
    if end is not None:
        ids[:-1, -1] = end
        ids[-1, length - padded - 1] = end
    if padding is not None and padded:
        ids[-1, length - padded :] = padding
