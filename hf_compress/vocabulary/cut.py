"""Cut a model's vocabulary to the rows that stay, and make its configs and modules say so."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.shrinking.apply import plain_copy, slice_in_place
from hf_compress.shrinking.plan import GroupPlan, ShrinkPlan
from hf_compress.vocabulary.config_ids import configs_of, named_ids, rewrite_ids
from hf_compress.vocabulary.table import Vocabulary, text_config, twin
from hf_compress.vocabulary.tokenizer import Renumbering


def cut(model: PreTrainedModel, vocabulary: Vocabulary, renumbering: Renumbering) -> PreTrainedModel:
    """Return a copy of the model in eval mode with the renumbered rows only.

    Raises:
        ShrinkError: If forward code depends on ids that change, or the new config does not describe the result.
    """
    new_ids = renumbering.new_ids()

    def translate(token_id: int) -> int:
        return new_ids.get(token_id, token_id)  # ids beyond the old table name no token, before and after

    _check_fixed_ids(model, vocabulary, new_ids)
    small = plain_copy(model)
    slice_in_place(small, _plan(model, vocabulary, renumbering))
    before = twin(model, model.config)
    for config in configs_of(small):
        rewrite_ids(config, translate)
        if isinstance(config, PretrainedConfig) and getattr(config, "vocab_size", None) == vocabulary.rows:
            config.vocab_size = len(renumbering.old_ids)
    after = twin(model, small.config)
    _copy_integers(small, before, after)
    _check_described(small, after)
    small.train(False)
    return small


def _plan(model: PreTrainedModel, vocabulary: Vocabulary, renumbering: Renumbering) -> ShrinkPlan:
    keep: dict[str, dict[int, list[int]]] = {}
    for name, dim in vocabulary.dims:
        keep.setdefault(name, {})[dim] = list(renumbering.old_ids)
    group = GroupPlan(kind="vocab", num_units=vocabulary.rows, kept=renumbering.old_ids)
    sizes = dict(model.named_parameters())
    rows = [sizes[name].numel() // vocabulary.rows for name, _ in vocabulary.dims if name in sizes]
    before = sum(parameter.numel() for parameter in sizes.values())
    after = before - sum(rows) * (vocabulary.rows - len(renumbering.old_ids))
    return ShrinkPlan(
        model_class=type(model).__name__,
        groups={vocabulary.table: group},
        keep=keep,
        zero={},
        num_parameters=(before, after),
    )


def _check_fixed_ids(model: PreTrainedModel, vocabulary: Vocabulary, new_ids: Mapping[int, int]) -> None:
    """Refuse new numbers for ids on which forward code depends and that no config tells it."""
    named = named_ids(model)
    for token_id, module in vocabulary.numbers:
        if 0 <= token_id < vocabulary.rows and token_id not in named and new_ids.get(token_id) != token_id:
            new = f"its new id is {new_ids[token_id]}" if token_id in new_ids else "this token was dropped"
            raise ShrinkError(
                f"prune_vocabulary: {module or 'forward'} compares token ids with {token_id} or writes it there, no "
                f"config names it, and {new}. A number in the code cannot follow."
            )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        pad = module.padding_idx
        if not _is_vocabulary(model, vocabulary, module) and new_ids.get(pad, pad) != pad:
            raise ShrinkError(
                f"prune_vocabulary: {name or 'an embedding'} counts from the padding token's id {pad} as well, and its "
                f"new id is {new_ids[pad]}. Keep more than {pad} tokens (keep_tokens), so that it can stay {pad}."
            )


def _is_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary, module: nn.Embedding) -> bool:
    return module.weight is dict(model.named_parameters())[vocabulary.table]


def _copy_integers(small: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel) -> None:
    """Set the integers of modules that differ between models built from the old and from the new config.

    ``padding_idx`` of embeddings and ``vocab_size`` of language-model heads are such; what the user has set by hand
    since then is left alone.
    """
    old, new = dict(before.named_modules()), dict(after.named_modules())
    for name, module in small.named_modules():
        if name not in old or name not in new:
            continue
        for key, value in vars(new[name]).items():
            was = vars(old[name]).get(key)
            if _is_number(value) and value != was and getattr(module, key, None) == was:
                setattr(module, key, value)


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_number(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _check_described(small: PreTrainedModel, built: PreTrainedModel) -> None:
    expected = {name: tuple(p.shape) for name, p in built.named_parameters(remove_duplicate=False)}
    expected |= {name: tuple(b.shape) for name, b in built.named_buffers(remove_duplicate=False)}
    actual = {name: tuple(p.shape) for name, p in small.named_parameters(remove_duplicate=False)}
    actual |= {name: tuple(b.shape) for name, b in small.named_buffers(remove_duplicate=False)}
    for name, shape in actual.items():
        if expected.get(name) != shape:
            raise ShrinkError(
                f"prune_vocabulary: {name} would have shape {shape}, but the new config (vocab_size "
                f"{text_config(small.config).vocab_size}) gives {expected.get(name)}, so from_pretrained could not "
                "load it. The original model is untouched."
            )
