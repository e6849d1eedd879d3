"""Token ids in configs: find them, and rewrite them."""

import re
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

ID_FIELD = re.compile(
    r"(.*_)?token_(id|ids|index)|(begin_)?suppress_tokens|(bad|force)_words_ids|(lang|task)_to_id|"
    r"forced_decoder_ids|sequence_bias"
)
"""Fields of configs and generation configs that hold token ids: ints, or nested lists of them."""

Translate = Callable[[int], int]


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig | GenerationConfig]:
    """Return every config that the model and its modules hold, nested ones included, each once."""
    found: dict[int, PretrainedConfig | GenerationConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig | GenerationConfig) and id(config) not in found:
            found[id(config)] = config
            for value in list(vars(config).values()):
                add(value)

    for module in model.modules():
        add(getattr(module, "config", None))
        add(getattr(module, "generation_config", None))
    return list(found.values())


def named_ids(model: PreTrainedModel) -> dict[int, str]:
    """Return the token ids that the model's configs name, with the field that names each."""
    found: dict[int, str] = {}
    for config in configs_of(model):
        for field, holder in _id_fields(vars(config)):

            def note(token_id: int, field: str = field) -> int:
                found.setdefault(token_id, field)
                return token_id

            _rewritten(field, holder[field], note)
    return found


def rewrite_ids(config: PretrainedConfig | GenerationConfig, translate: Translate) -> None:
    """Rewrite the token ids in one config, in place; configs nested in it are left alone."""
    for field, holder in list(_id_fields(vars(config))):
        holder[field] = _rewritten(field, holder[field], translate)


def _id_fields(values: MutableMapping[str, Any]) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    for name, value in list(values.items()):
        if isinstance(name, str) and ID_FIELD.fullmatch(name):
            yield name, values
        elif isinstance(value, dict):
            yield from _id_fields(value)


def _rewritten(field: str, value: Any, translate: Translate) -> Any:
    if field == "forced_decoder_ids" and value:
        return [[position, _each(token_id, translate)] for position, token_id in value]
    if field == "sequence_bias" and value:
        if isinstance(value, dict):
            return {_each(ids, translate): bias for ids, bias in value.items()}
        return [[_each(ids, translate), bias] for ids, bias in value]
    return _each(value, translate)


def _each(value: Any, translate: Translate) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, translate) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(item, translate) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return translate(value)
    return value
