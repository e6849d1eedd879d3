"""Remove the vocabulary rows that a corpus never uses, from the model and from its tokenizer."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.errors import ShrinkError, TargetError
from hf_compress.shrinking.plan import refuse_compressed
from hf_compress.vocabulary import config_ids
from hf_compress.vocabulary import tokenizer as rewriting
from hf_compress.vocabulary.check import check_model, check_tokenizer
from hf_compress.vocabulary.closure import Closure, vocabulary_of
from hf_compress.vocabulary.cut import cut
from hf_compress.vocabulary.table import Vocabulary, find_vocabulary
from hf_compress.vocabulary.tokenizer import Renumbering
from hf_compress.vocabulary.usage import Text, Usage, count_tokens, plain_backend


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    keep_tokens: Iterable[str] = (),
    min_count: int = 1,
    multiple_of: int = 1,
    example_inputs: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return copies of model and tokenizer without the tokens that ``texts`` never use.

    Every text whose tokens all stay is tokenized into the same tokens as before, and the model computes the same for
    it; a language model's logits are the old ones of the tokens that stay. Other texts written in the same characters
    are spelled in shorter tokens, and characters that occur in no kept token become bytes or the unknown token.

    Added and special tokens, tokens that a config names by id, the bytes of byte-level tokenizers and of byte
    fallback, and the tokens from which others are merged always stay. Special tokens keep their ids where these exist
    in the smaller vocabulary. The stock classes load the result; rows of the embedding that belong to no token go.

    Args:
        model: Any transformers model that looks token ids up in one embedding; it is left as it was.
        tokenizer: Its tokenizer, of the ``tokenizers`` library; it is left as it was.
        texts: Texts or pairs of texts, read once: a list, a generator, a column of a data set (``dataset["text"]``).
            Take all that the model is to understand, the training data at least.
        keep_tokens: Tokens, as the tokenizer writes them (``"##ing"``), that stay although the texts do not use them.
        min_count: Drop tokens that occur fewer times than this.
        multiple_of: Round the number of rows up to a multiple of this, for fast kernels: with further tokens, those
            that occur most and then those of the lowest ids, and then with rows that belong to no token.
        example_inputs: Keyword arguments for the forward pass that is recorded; made from the config by default. Only
            models that do not run on those need it, such as some that see images.
        verify: Compare tokens and outputs with those of the originals on texts of the corpus.

    Returns:
        The smaller model, in eval mode, and its tokenizer.

    Raises:
        ShrinkError: If an argument is not allowed, model and tokenizer do not fit together, nothing can be removed,
            the vocabulary is used in a way that is not understood, or the result differs from the original.
        TargetError: If ``keep_tokens`` holds no token of the tokenizer.
        GraphError: If the model's forward pass cannot be recorded.
    """
    _check_arguments(model, min_count, multiple_of)
    data = rewriting.serialized(tokenizer)
    wanted = _known_tokens(keep_tokens, rewriting.token_ids(data))
    vocabulary = find_vocabulary(model, example_inputs)
    _check_fits(data, vocabulary)
    usage = count_tokens(plain_backend(tokenizer.backend_tokenizer), texts, _unknown_id(data))
    renumbering = _choose(model, data, vocabulary, usage, wanted, min_count, multiple_of)
    small_tokenizer = rewriting.rebuild(tokenizer, rewriting.rewrite(data, renumbering))
    small = cut(model, vocabulary, renumbering)
    if verify:
        check_tokenizer(tokenizer, small_tokenizer, usage.sample, renumbering)
        check_model(model, small, small_tokenizer, usage.sample, renumbering, example_inputs)
    return small, small_tokenizer


def _check_arguments(model: PreTrainedModel, min_count: int, multiple_of: int) -> None:
    for name, value in (("min_count", min_count), ("multiple_of", multiple_of)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShrinkError(f"prune_vocabulary: {name}={value!r}; allowed: an int >= 1.")
    if not isinstance(model, PreTrainedModel):
        raise ShrinkError(
            f"prune_vocabulary: got {type(model).__name__}; allowed: a transformers PreTrainedModel. Merge and unload "
            "PEFT adapters first."
        )
    refuse_compressed(model)


def _known_tokens(keep_tokens: Iterable[str], known: Mapping[str, int]) -> list[str]:
    if isinstance(keep_tokens, str):
        raise ShrinkError(f"prune_vocabulary: keep_tokens={keep_tokens!r}: pass a list of strings: [{keep_tokens!r}].")
    wanted = list(keep_tokens)
    for token in wanted:
        if token not in known:
            raise TargetError(
                f"prune_vocabulary: keep_tokens: the tokenizer has no token {token!r}. Write tokens as "
                "tokenizer.tokenize(text) does, prefix included, or pass texts that use them."
            )
    return wanted


def _check_fits(data: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    token, highest = max(rewriting.token_ids(data).items(), key=lambda item: item[1])
    if highest >= vocabulary.rows:
        raise ShrinkError(
            f"prune_vocabulary: the tokenizer gives {token!r} the id {highest}, but {vocabulary.table} has only "
            f"{vocabulary.rows} rows. It is the tokenizer of another model, or tokens were added without "
            "model.resize_token_embeddings(len(tokenizer))."
        )
    ids = vocabulary_of(data["model"]).values()
    if len(set(ids)) < len(ids):
        raise ShrinkError(
            "prune_vocabulary: the tokenizer gives several tokens the same id; allowed: one id for each token. Its "
            "tokenizer.json is damaged; load the original one."
        )


def _unknown_id(data: Mapping[str, Any]) -> int | None:
    """Only WordPiece makes words unknown although it knows their characters."""
    if data["model"]["type"] != "WordPiece":
        return None
    return rewriting.token_ids(data).get(data["model"]["unk_token"])


def _choose(
    model: PreTrainedModel,
    data: Mapping[str, Any],
    vocabulary: Vocabulary,
    usage: Usage,
    wanted: Iterable[str],
    min_count: int,
    multiple_of: int,
) -> Renumbering:
    section = data["model"]
    closure = Closure(section, byte_level=rewriting.is_byte_level(data))
    named = {i for i in config_ids.named_ids(model) if i < vocabulary.rows} | rewriting.named_ids(data)
    ids = rewriting.token_ids(data)
    used = {i for i, count in usage.counts.items() if count >= min_count}
    if not used - {token["id"] for token in data["added_tokens"]}:
        raise ShrinkError(
            f"prune_vocabulary: no token but added ones occurs {min_count} times in the {usage.num_texts} texts. Pass "
            "the texts that the model will see, or a lower min_count."
        )
    staying = used | named
    kept = closure.of({token for token, i in ids.items() if i in staying} | set(wanted), usage.unknown)
    with_token = set(ids.values())
    rows = named - with_token
    extra = sum(token["content"] not in closure.vocabulary for token in data["added_tokens"]) + len(rows)
    kept = _filled(closure, kept, usage, -(len(kept) + extra) % multiple_of)
    missing = -(len(kept) + extra) % multiple_of
    free = [row for row in range(vocabulary.rows) if row not in rows and row not in with_token]
    renumbering = rewriting.renumber(data, kept, named | _unigram_unknown(section), {*rows, *free[:missing]})
    _check_smaller(renumbering, vocabulary, missing - len(free), multiple_of)
    return renumbering


def _unigram_unknown(section: Mapping[str, Any]) -> set[int]:
    return {section["unk_id"]} if section.get("unk_id") is not None else set()


def _filled(closure: Closure, kept: set[str], usage: Usage, missing: int) -> set[str]:
    """Add up to ``missing`` dropped tokens, with what they are merged from."""
    if missing == 0:
        return kept
    ids, goal = closure.vocabulary, len(kept) + missing
    for token in sorted(ids.keys() - kept, key=lambda token: (-usage.counts[ids[token]], ids[token])):
        new = closure.of([token]) - kept
        if len(kept) + len(new) <= goal:
            kept = kept | new
        if len(kept) == goal:
            break
    return kept


def _check_smaller(renumbering: Renumbering, vocabulary: Vocabulary, lacking: int, multiple_of: int) -> None:
    size = len(renumbering.old_ids)
    if lacking > 0 or size >= vocabulary.rows:
        rounded = f", rounded up to a multiple of {multiple_of}," if multiple_of > 1 else ""
        raise ShrinkError(
            f"prune_vocabulary: {size} tokens{rounded} have to stay of {vocabulary.rows} rows, so nothing would be "
            "removed. Pass fewer texts, a higher min_count or a lower multiple_of."
        )
