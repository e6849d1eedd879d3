"""Rewrite a tokenizer for fewer tokens: its JSON form, then the object that transformers loads from it."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_compress.errors import ShrinkError
from hf_compress.vocabulary.closure import kept_merges, vocabulary_of

ALGORITHMS = ("BPE", "Unigram", "WordLevel", "WordPiece")

SETTINGS = (
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
"""Settings of the object that transformers saves only if they were arguments when it was made."""

OLD_FILES = ("added_tokens.json", "tekken.json", "vocab.json")
"""Files that describe the old vocabulary in other forms; classes prefer some of them to ``tokenizer.json``."""

LEFT_BY_LOADING = ("is_local", "local_files_only")


@dataclass(frozen=True)
class Renumbering:
    """New ids of the tokens and rows that stay."""

    old_ids: tuple[int, ...]
    """The old id by new id; rows of the embedding without a token come last."""

    def new_ids(self) -> dict[int, int]:
        """Return the new id by old id."""
        return {old: new for new, old in enumerate(self.old_ids)}


def serialized(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the JSON form of a tokenizer of the ``tokenizers`` library.

    Raises:
        ShrinkError: If there is none, or its algorithm is not supported.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ShrinkError(
            f"prune_vocabulary: the tokenizer is a {type(tokenizer).__name__}, which has no backend_tokenizer; "
            "allowed: a PreTrainedTokenizerFast (of the tokenizers library). Load it with AutoTokenizer, or convert it "
            "and wrap the result: PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    try:
        data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises plain Exception for parts written in Python
        raise ShrinkError(
            f"prune_vocabulary: the {type(tokenizer).__name__} cannot be written as JSON ({error}). Replace parts that "
            "are written in Python by those of the tokenizers library."
        ) from error
    model = data["model"]
    if model["type"] not in ALGORITHMS:
        raise ShrinkError(
            f"prune_vocabulary: the tokenizer's algorithm is {model['type']!r}; allowed: {', '.join(ALGORITHMS)}."
        )
    if model.get("dropout"):
        raise ShrinkError(
            f"prune_vocabulary: the tokenizer has dropout={model['dropout']}, so a text has no fixed tokens. Set "
            "tokenizer.backend_tokenizer.model.dropout = None first."
        )
    return data


def token_ids(data: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id, added tokens included."""
    return {**vocabulary_of(data["model"]), **{token["content"]: token["id"] for token in data["added_tokens"]}}


def is_byte_level(part: Any) -> bool:
    """Whether the tokenizer spells texts in the 256 characters that stand for bytes."""
    if isinstance(part, Mapping):
        inner = (value for key, value in part.items() if key not in ("model", "added_tokens", "post_processor"))
        return part.get("type") == "ByteLevel" or any(is_byte_level(value) for value in inner)
    return isinstance(part, list) and any(is_byte_level(item) for item in part)


def named_ids(data: Mapping[str, Any]) -> set[int]:
    """Return the ids that the tokenizer's sections besides the model name: added tokens, post-processor, padding."""
    found: set[int] = set()

    def note(token_id: int) -> int:
        found.add(token_id)
        return token_id

    _rewrite_sections(copy.deepcopy({key: value for key, value in data.items() if key != "model"}), note)
    return found


def renumber(data: Mapping[str, Any], kept: set[str], pinned: Iterable[int], rows: Iterable[int]) -> Renumbering:
    """Give the kept tokens new ids, without holes.

    Tokens of the model section come first and added ones follow, as the tokenizers library numbers them when it
    loads. Pinned tokens keep their ids where these still exist: some tokenizer classes and models expect, say, the
    unknown token at 3. The others follow in their old order.

    Args:
        data: The tokenizer's JSON form.
        kept: The tokens of the model section that stay; added tokens always stay.
        pinned: Old ids that should not change.
        rows: Rows without a token that stay as well, after all tokens.
    """
    vocabulary = vocabulary_of(data["model"])
    size = len(kept)
    fixed = {i for i in pinned if i < size} & {vocabulary[token] for token in kept}
    movable = sorted(vocabulary[token] for token in kept if vocabulary[token] not in fixed)
    rest = iter(movable)
    old_ids = [position if position in fixed else next(rest) for position in range(size)]
    old_ids += sorted(token["id"] for token in data["added_tokens"] if token["content"] not in vocabulary)
    return Renumbering((*old_ids, *sorted(set(rows) - set(old_ids))))


def rewrite(data: Mapping[str, Any], renumbering: Renumbering) -> dict[str, Any]:
    """Return the JSON form of the tokenizer with the renumbered tokens only."""
    rewritten = copy.deepcopy(dict(data))
    model, new_ids = rewritten["model"], renumbering.new_ids()
    old_vocabulary = vocabulary_of(model)
    kept = {token for token, old in old_vocabulary.items() if old in new_ids}
    order = sorted(kept, key=lambda token: new_ids[old_vocabulary[token]])
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old_vocabulary[token]] for token in order]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[old_vocabulary[token]] for token in order}
    if model["type"] == "BPE":
        model["merges"] = [list(pair) for pair in kept_merges(model, kept)]
    _rewrite_sections(rewritten, new_ids.__getitem__)
    rewritten["added_tokens"].sort(key=lambda token: token["id"])
    return rewritten


def rebuild(tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load a tokenizer of the same class and settings with another JSON form, the way ``from_pretrained`` does.

    Raises:
        ShrinkError: If the class makes something else of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).iterdir():
            if path.is_file() and (path.suffix not in (".json", ".jinja", ".py") or path.name in OLD_FILES):
                path.unlink()
        (Path(folder) / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        rebuilt: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    _copy_settings(tokenizer, rebuilt)
    expected = token_ids(data)
    actual = rebuilt.get_vocab()
    if actual != expected or rebuilt.all_special_tokens != tokenizer.all_special_tokens:
        wrong = sorted(set(actual.items()) ^ set(expected.items()))[:4]
        raise ShrinkError(
            f"prune_vocabulary: {type(tokenizer).__name__} makes its vocabulary in a way of its own when it is loaded "
            f"(differs in: {wrong or rebuilt.all_special_tokens}). Wrap it first: "
            "PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)."
        )
    return rebuilt


def _copy_settings(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    for name in LEFT_BY_LOADING:
        if name not in old.init_kwargs:
            new.init_kwargs.pop(name, None)
    for name in SETTINGS:
        value = getattr(old, name, None)
        if getattr(new, name, None) != value:
            setattr(new, name, value)
            new.init_kwargs[name] = value
    new.name_or_path = old.name_or_path
    new.init_kwargs["name_or_path"] = old.name_or_path


def _rewrite_sections(data: dict[str, Any], translate: Callable[[int], int]) -> None:
    for token in data["added_tokens"]:
        token["id"] = translate(token["id"])
    if data.get("padding"):
        data["padding"]["pad_id"] = translate(data["padding"]["pad_id"])
    if data.get("post_processor"):
        _rewrite_post_processor(data["post_processor"], translate)


def _rewrite_post_processor(processor: dict[str, Any], translate: Callable[[int], int]) -> None:
    for inner in processor.get("processors", ()):
        _rewrite_post_processor(inner, translate)
    for end in ("sep", "cls"):
        if end in processor:
            token, token_id = processor[end]
            processor[end] = [token, translate(token_id)]
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [translate(token_id) for token_id in token["ids"]]
