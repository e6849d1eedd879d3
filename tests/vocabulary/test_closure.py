"""Tokens stay the same: by hand where an algorithm has a trap, and on random corpora for all of them."""

import json

import pytest
import trained_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_compress.vocabulary import tokenizer as rewriting
from hf_compress.vocabulary.closure import Closure, kept_merges
from hf_compress.vocabulary.usage import count_tokens, plain_backend

WORDS = sorted({word for sentence in trained_tokenizers.SENTENCES for word in sentence.split()})
TEXTS = st.lists(
    st.lists(
        st.one_of(
            st.sampled_from(WORDS),
            st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS), st.integers(1, 4)).map(
                lambda parts: parts[0][: parts[2]] + parts[1][parts[2] :]
            ),
            st.text("abcdeimnoqstuz\u00e9\u65e5\u2581#<0xQ> ", max_size=8),
        ),
        max_size=6,
    ).map(" ".join),
    min_size=1,
    max_size=4,
)
BUILT = {}


def built(make):
    """Training takes as long as hundreds of examples."""
    if make not in BUILT:
        data = rewriting.serialized(make())
        BUILT[make] = data, plain_backend(Tokenizer.from_str(json.dumps(data)))
    return BUILT[make]


def pruned(data, backend, texts, min_count=1):
    """The tokenizer with what ``texts`` need and nothing else, and the renumbering."""
    ids = rewriting.token_ids(data)
    unknown = ids.get(data["model"].get("unk_token")) if data["model"]["type"] == "WordPiece" else None
    usage = count_tokens(backend, texts, unknown)
    wanted = {i for i, count in usage.counts.items() if count >= min_count} | rewriting.named_ids(data)
    closure = Closure(data["model"], byte_level=rewriting.is_byte_level(data))
    kept = closure.of({token for token, i in ids.items() if i in wanted}, usage.unknown)
    renumbering = rewriting.renumber(data, kept, rewriting.named_ids(data), ())
    return Tokenizer.from_str(json.dumps(rewriting.rewrite(data, renumbering))), renumbering


@pytest.mark.parametrize("make", trained_tokenizers.ALL)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=TEXTS, min_count=st.integers(1, 2))
def test_texts_whose_tokens_stay_are_tokenized_as_before(make, texts, min_count) -> None:
    data, backend = built(make)
    small, renumbering = pruned(data, backend, texts, min_count)
    new_ids = renumbering.new_ids()
    for text in texts:
        before, after = backend.encode(text), small.encode(text)
        if all(i in new_ids for i in before.ids):
            assert after.tokens == before.tokens
            assert after.ids == [new_ids[i] for i in before.ids]
            assert small.decode(after.ids) == backend.decode(before.ids)
        else:
            assert min_count > 1
    assert sorted(small.get_vocab().values()) == list(range(small.get_vocab_size()))


@pytest.mark.parametrize("make", [trained_tokenizers.byte_level_bpe, trained_tokenizers.byte_fallback_bpe])
@given(text=st.text(max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_bytes_spell_any_other_text(make, text) -> None:
    data, backend = built(make)
    small, _ = pruned(data, backend, ["the fox"])
    unknown = small.token_to_id("<unk>")
    encoded = small.encode(text, add_special_tokens=False)
    assert unknown is None or unknown not in encoded.ids
    assert small.decode(encoded.ids) == backend.decode(backend.encode(text, add_special_tokens=False).ids)


def by_hand(model, texts):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    data = json.loads(tokenizer.to_str())
    small, _ = pruned(data, plain_backend(tokenizer), texts)
    return tokenizer, small


def test_an_unknown_word_stays_unknown() -> None:
    """Without "ab", which no text uses, "abc" would be "a", "##bc"."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "ab", "a", "x", "##bc", "y"])}
    tokenizer, small = by_hand(models.WordPiece(vocabulary, unk_token="[UNK]"), ["abc a xbc"])
    expected = ["[UNK]", "a", "x", "##bc"]
    assert tokenizer.encode("abc a xbc").tokens == small.encode("abc a xbc").tokens == expected
    assert small.token_to_id("ab") is not None and small.token_to_id("y") is None
    without, _ = by_hand(models.WordPiece({t: i for t, i in vocabulary.items() if t != "ab"}, unk_token="[UNK]"), ["a"])
    assert without.encode("abc").tokens == ["a", "##bc"]


def test_the_unknown_score_stays() -> None:
    """Without "z", which no text uses, "f" would be unknown at -19, and "abcde", "f" better than three pieces."""
    pieces = [("<unk>", 0.0), ("abcde", -1.0), ("ab", -9.0), ("cd", -9.0), ("ef", -9.0), ("z", -30.0), ("y", -20.0)]
    tokenizer, small = by_hand(models.Unigram(pieces, unk_id=0), ["abcdef abcde"])
    expected = ["ab", "cd", "ef", "abcde"]
    assert tokenizer.encode("abcdef abcde").tokens == small.encode("abcdef abcde").tokens == expected
    assert small.token_to_id("z") is not None and small.token_to_id("y") is None
    without, _ = by_hand(models.Unigram([piece for piece in pieces if piece[0] != "z"][:5], unk_id=0), ["ab"])
    assert without.encode("abcdef").tokens == ["abcde", "f"]


def test_a_token_keeps_the_tokens_on_its_own_way_and_no_others() -> None:
    """ "abc" is merged from "a", "bc"; the merge from "ab", "c" exists and is never reached."""
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "d", "bc", "ab", "abc", "cd"])}
    model = models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "c"), ("a", "bc")])
    _, small = by_hand(model, ["abc"])
    assert set(small.get_vocab()) == {"a", "b", "c", "bc", "abc"}
    assert small.encode("abc ab").tokens == ["abc", "a", "b"]


def test_a_whole_word_without_a_way_to_it_keeps_all_its_parts() -> None:
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "d"])}
    model = models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")], ignore_merges=True)
    tokenizer, small = by_hand(model, ["abc"])
    assert tokenizer.encode("abc").tokens == small.encode("abc").tokens == ["abc"]
    assert set(small.get_vocab()) == {"a", "b", "c", "ab", "abc"}


def test_merges_keep_their_order() -> None:
    model = {"type": "BPE", "merges": ["a b", "c d", "ab cd", "b c"]}
    assert kept_merges(model, {"a", "b", "c", "ab", "bc"}) == [("a", "b"), ("b", "c")]


def test_pinned_ids_stay_where_they_fit() -> None:
    data, _ = built(trained_tokenizers.word_piece)
    ids = rewriting.token_ids(data)
    renumbering = rewriting.renumber(data, {"[PAD]", "[MASK]", "[SEP]", "the", "z", "y"}, {0, 3, 4, ids["z"]}, {7, 9})
    new = renumbering.new_ids()
    assert [new[ids[token]] for token in ("[PAD]", "[SEP]", "[MASK]")] == [0, 3, 4]
    assert sorted(new[ids[token]] for token in ("y", "z", "the")) == [1, 2, 5]
    assert renumbering.old_ids[6:] == (7, 9)  # rows without a token
