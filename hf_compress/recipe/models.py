"""Loading models and tokenizers, with one message where that fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.errors import ConfigError
from hf_compress.loading import SAFE, check_weights, loading

if TYPE_CHECKING:
    from hf_compress.recipe.tasks.base import Task


@dataclass(frozen=True)
class Loaded:
    """A model, and whether the checkpoint had all of it."""

    model: PreTrainedModel

    new: tuple[str, ...]
    """Parameters that the checkpoint lacked or had in other sizes: they are random."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can pad: with its end-of-sequence token if it has none for that.

    Raises:
        ConfigError: If it cannot be loaded, knows no words, or has neither token.
    """
    with loading(f"{name}: tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) == 0:
        raise ConfigError(f"{name}: has no tokenizer; save one beside the model.")
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        # Where there are no files, transformers makes an empty one up; some kinds have a mark of spaces all the same.
        raise ConfigError(
            f"{name}: has no tokenizer, or one that knows no words: every word would be unknown. Save the model's "
            "tokenizer in the same folder: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"{name}: the tokenizer has neither a padding nor an end-of-sequence token, so texts of several "
                "lengths fit in no batch. Set tokenizer.pad_token and save the tokenizer."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_student(name: str, task: "Task", processor: Any, labels: Sequence[str]) -> Loaded:
    """Load the model to train, in float32, with a new head where it has none for the labels.

    Args:
        name: Hub name or folder.
        task: Says which class loads it.
        processor: A tokenizer gives the model its padding token if it has none.
        labels: Names of the classes, empty if there are none.

    Raises:
        ConfigError: If it cannot be loaded for the task, or has fewer embeddings than the tokenizer has tokens.
    """
    names = dict(enumerate(labels))
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **SAFE}
    if labels:
        options |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        options |= {"num_labels": len(names), "ignore_mismatched_sizes": True}
    check_weights(name)
    with loading(name):
        model, report = task.auto_class.from_pretrained(name, **options)
    new = tuple(sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}))
    if new and not task.may_have_new_head:
        raise ConfigError(f"{name}: its checkpoint lacks {', '.join(new)}; a language model needs all of its weights.")
    if isinstance(processor, PreTrainedTokenizerBase):
        _fit_tokenizer(name, model, processor)
    return Loaded(model, new)


def _fit_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings: Any = model.get_input_embeddings()
    needed = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if needed > embeddings.weight.shape[0]:
        raise ConfigError(
            f"{name}: the tokenizer has {needed} tokens, the model embeds only {embeddings.weight.shape[0]}. Use the "
            "model's own tokenizer, or call model.resize_token_embeddings and save the model again."
        )
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
