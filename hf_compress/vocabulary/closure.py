"""Which tokens must stay so that every text whose tokens stay is tokenized as before.

The four algorithms of the ``tokenizers`` library see more than the tokens that come out: merges pass through
intermediate tokens, a longest match that leads nowhere makes a word unknown, the unknown score depends on the lowest
score. For each algorithm, the functions here add the tokens behind that, and those that spell any text written in the
characters of the kept tokens.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers

Model = Mapping[str, Any]
"""The ``model`` section of a ``tokenizer.json``."""


def vocabulary_of(model: Model) -> dict[str, int]:
    """Return token -> id of the model section."""
    if model["type"] == "Unigram":
        return {piece: position for position, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


class Closure:
    """Adds to tokens those that they need; what is closed stays closed when more is added.

    Args:
        model: The model section.
        byte_level: Whether texts are spelled in the 256 characters that stand for bytes.
    """

    def __init__(self, model: Model, *, byte_level: bool) -> None:
        self.model = model
        self.vocabulary = vocabulary_of(model)
        self.prefix: str = model.get("continuing_subword_prefix") or ""
        self.suffix: str = model.get("end_of_word_suffix") or ""
        self.ranks = {_pair(merge): rank for rank, merge in enumerate(model.get("merges") or ())}
        self.makers: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for left, right in self.ranks:
            self.makers[_merged(model, left, right)].append((left, right))
        self.always = self._always(byte_level)

    def of(self, tokens: Iterable[str], unknown_words: Iterable[str] = ()) -> set[str]:
        """Return ``tokens`` and every token of the model section that they need.

        Args:
            tokens: The tokens to keep; those that the model section does not have are ignored.
            unknown_words: Words that became the unknown token and have to stay unknown (WordPiece).
        """
        kept = {token for token in tokens if token in self.vocabulary}
        if self.model["type"] == "BPE":
            kept = self._with_parts(kept)
        if self.model["type"] == "WordPiece":
            kept |= {token for word in unknown_words for token in self._dead_end(word)}
        if self.model["type"] != "WordLevel":
            kept |= self._spellings(kept)
        return kept | self.always

    def _always(self, byte_level: bool) -> set[str]:
        """Bytes, the unknown token, and the lowest score of Unigram.

        Unigram's best segmentation stays the best of fewer if unknown characters do not become better ones: their score
        is a constant below the lowest of all.
        """
        model = self.model
        wanted: set[str] = {model["unk_token"]} if model.get("unk_token") is not None else set()
        if model["type"] == "Unigram":
            wanted.add(min(model["vocab"], key=lambda piece: piece[1])[0])
            if model.get("unk_id") is not None:
                wanted.add(model["vocab"][model["unk_id"]][0])
        if byte_level:
            wanted |= {a + end for a in pre_tokenizers.ByteLevel.alphabet() for end in ("", self.suffix)}
        if model.get("byte_fallback"):
            wanted |= set(map("<0x{:02X}>".format, range(256)))
        return wanted & self.vocabulary.keys()

    def _spellings(self, tokens: Iterable[str]) -> set[str]:
        """The tokens of single characters, in every form, for all characters that occur in ``tokens``.

        The given texts do not need them; others in the same characters would become unknown without.
        """
        characters = {c for token in tokens for c in token.removeprefix(self.prefix).removesuffix(self.suffix)}
        ends = [(start, end) for start in ("", self.prefix) for end in ("", self.suffix)]
        return {f"{start}{c}{end}" for c in characters for start, end in ends} & self.vocabulary.keys()

    def _dead_end(self, word: str) -> Iterator[str]:
        """The longest matches in an unknown word, up to where nothing matches: shorter ones could lead past it."""
        if len(word) > self.model["max_input_chars_per_word"]:
            return
        start = 0
        while start < len(word):
            prefix = self.prefix if start else ""
            matches = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.vocabulary)
            end = next(matches, None)
            if end is None:
                return
            yield prefix + word[start:end]
            start = end

    def _with_parts(self, tokens: set[str]) -> set[str]:
        """Add the tokens from which each is merged.

        No merge crosses the borders of a token that comes out, so it is merged like a word of its own. Tokens that no
        word leads to (special ones, or whole words with ``ignore_merges``) keep all pairs that would make them.
        """
        waiting, seen = list(tokens), set(tokens)
        while waiting:
            token = waiting.pop()
            parts = self._derivation(token)
            if parts is None or (self.model.get("byte_fallback") and "<0x" in token):
                parts = {part for pair in self.makers.get(token, ()) for part in pair}
            new = (parts & self.vocabulary.keys()) - seen
            waiting += new
            seen |= new
        return seen

    def _derivation(self, token: str) -> set[str] | None:
        """Return all symbols between single characters and ``token``, or None if the merges do not lead there."""
        inside = bool(self.prefix) and token.startswith(self.prefix)
        ends = bool(self.suffix) and token.endswith(self.suffix)
        symbols = list(token.removeprefix(self.prefix).removesuffix(self.suffix))
        if not symbols:
            return None
        symbols = [self.prefix + c if inside or position else c for position, c in enumerate(symbols)]
        symbols[-1] += self.suffix if ends else ""
        seen = set(symbols)
        while len(symbols) > 1:
            ranked = [(self.ranks.get(pair, -1), i) for i, pair in enumerate(itertools.pairwise(symbols))]
            possible = [pair for pair in ranked if pair[0] >= 0]
            if not possible:
                return None
            _, at = min(possible)
            symbols[at : at + 2] = [_merged(self.model, symbols[at], symbols[at + 1])]
            seen.add(symbols[at])
        return seen if symbols == [token] else None


def kept_merges(model: Model, kept: set[str]) -> list[tuple[str, str]]:
    """Return the merges whose parts and result all stay, in the order of their ranks.

    Where a text was merged through kept tokens only, the merge of the lowest rank is the same at every step, so the
    result is the same.
    """
    merges = []
    for left, right in map(_pair, model["merges"]):
        if left in kept and right in kept and _merged(model, left, right) in kept:
            merges.append((left, right))
    return merges


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merged(model: Model, left: str, right: str) -> str:
    return left + right[len(model.get("continuing_subword_prefix") or "") :]
