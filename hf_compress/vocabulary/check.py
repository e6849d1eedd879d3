"""Check a pruned model and tokenizer against the originals, on texts of the corpus."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.errors import ShrinkError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.shrinking import verify as verification
from hf_compress.vocabulary.table import text_config
from hf_compress.vocabulary.tokenizer import Renumbering
from hf_compress.vocabulary.usage import Text

MAX_LENGTH = 64
"""Texts are cut to this many tokens before the model sees them."""

BATCH_SIZE = 8
"""Texts that the model sees."""


def check_tokenizer(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, texts: Sequence[Text], renumbering: Renumbering
) -> None:
    """Check that every text without dropped tokens gives the same tokens as before.

    Raises:
        ShrinkError: If one does not.
    """
    old, new = copy.deepcopy(old), copy.deepcopy(new)  # calling a tokenizer changes its padding and truncation
    new_ids = renumbering.new_ids()
    for text in texts:
        before = _encode(old, [text])["input_ids"][0]
        if not all(token in new_ids for token in before):
            continue  # has tokens that are rarer than min_count
        after = _encode(new, [text])["input_ids"][0]
        if after != [new_ids[token] for token in before]:
            raise ShrinkError(
                f"prune_vocabulary: {str(text)[:80]!r} was {_shown(old, before)} and is now {_shown(new, after)}. "
                "The tokenizer does something that is not understood; nothing was changed."
            )


def check_model(
    old: PreTrainedModel,
    new: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    renumbering: Renumbering,
    example_inputs: Mapping[str, Any] | None = None,
) -> None:
    """Check that both models give the same numbers for the texts, along the vocabulary for the rows that stay.

    Args:
        old: The original model.
        new: The pruned one.
        tokenizer: The pruned tokenizer.
        texts: Texts of the corpus; the first few are used.
        renumbering: Which rows stayed.
        example_inputs: What the model was recorded on, if not on inputs made from its config; the model must run on
            the texts and on what in there is no tensor.

    Raises:
        ShrinkError: If they differ, or one does not run.
    """
    old_ids = torch.tensor(renumbering.old_ids)
    tokenizer = copy.deepcopy(tokenizer)  # calling a tokenizer changes its padding and truncation
    for batch in _batches(tokenizer, texts):
        encoded = _tensors(new, tokenizer, batch)
        inputs = _model_inputs(new, encoded, example_inputs)
        original = {name: old_ids[value] if name.endswith("input_ids") else value for name, value in inputs.items()}
        try:
            expected = verification.run(old, _to(original, old))
            actual = verification.run(new, _to(inputs, new))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise ShrinkError(
                f"prune_vocabulary: {type(new).__name__} does not run on texts of the corpus, so nothing can be "
                f"verified ({type(error).__name__}: {error}). If it needs other inputs, pass verify=False and compare "
                "the models on those. The original model is untouched."
            ) from error
        _compare(new, expected, actual, old_ids)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], **options: Any) -> Any:
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = None if isinstance(texts[0], str) else [text[1] for text in texts]
    return tokenizer(first, second, verbose=False, **options)


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(ids[:12])
    return f"{tokens}{'...' if len(ids) > len(tokens) else ''}"


def _batches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[list[Text]]:
    """Texts to run together: pairs and single texts apart, one by one where there is no padding token."""
    fit = [text for text in texts if _encode(tokenizer, [text])["input_ids"][0]]
    chosen = fit[:: max(1, len(fit) // BATCH_SIZE)][:BATCH_SIZE]
    if tokenizer.pad_token is None:
        return [[text] for text in chosen]
    alike = [[text for text in chosen if isinstance(text, str) == single] for single in (True, False)]
    return [batch for batch in alike if batch]


def _tensors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Text]) -> dict[str, Tensor]:
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    length = min(MAX_LENGTH, limit - 2) if isinstance(limit, int) and limit > 4 else MAX_LENGTH
    padding = tokenizer.pad_token is not None
    encoded = _encode(tokenizer, batch, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return dict(encoded)


def _model_inputs(
    model: PreTrainedModel, encoded: Mapping[str, Tensor], example_inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    ids = encoded["input_ids"]
    given = {**encoded, "decoder_input_ids": ids}
    if example_inputs is None:
        inputs = make_example_inputs(model, batch_size=ids.shape[0], length=ids.shape[1])
        return {name: given.get(name, value) for name, value in inputs.items()}
    return {
        name: given.get(name, value)
        for name, value in example_inputs.items()
        if name in given or not isinstance(value, Tensor)
    }


def _to(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _compare(model: PreTrainedModel, expected: list[Tensor], actual: list[Tensor], old_ids: Tensor) -> None:
    for before, after in zip(expected, actual, strict=True):
        for dim in range(before.dim()):
            if before.shape[dim] != after.shape[dim] == len(old_ids):
                before = before.index_select(dim, old_ids.to(before.device))
        error = verification.relative_error(before, after)
        allowed = verification.TOLERANCES.get(before.dtype, 1e-5)
        if error > allowed:
            raise ShrinkError(
                f"the pruned {type(model).__name__} differs from the original by {error:.1e} (allowed: "
                f"{allowed:.0e}) on texts of the corpus. Its forward depends on token ids in a way that is not "
                "understood; the result was discarded and the original model is untouched."
            )
