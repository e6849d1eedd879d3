"""Loading models by the class that their config names, with one message where that fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_compress.errors import CompressionError, ConfigError, shown

MAX_MODULES = 10_000
"""Layers, blocks or experts of one kind."""

MAX_SIZE = 1 << 36
"""Of any number in a config."""

MAX_MESSAGE = 1500
"""Characters of what another library said about files, which may quote them."""

MAX_NESTING = 8
"""Configs in each other."""

_COUNTS = ("layers", "n_layer", "depth", "blocks", "experts", "stages")
"""What names of fields have in them that say how many modules there are."""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what goes wrong with damaged or foreign files, which can be any exception, into one message.

    Raises:
        ConfigError: Instead of whatever is raised inside.
    """
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        text = "".join(each if each.isprintable() else "?" for each in text[:MAX_MESSAGE])
        raise ConfigError(f"{name}: cannot be loaded: {type(error).__name__}: {text}") from error


def load_config(name: str) -> Any:
    """Return the config of a model.

    Raises:
        ConfigError: If there is none, or it asks for more than any computer can hold.
    """
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # asked about it, a script would wait
        found = list(_too_many("", config.to_dict(), MAX_NESTING))
    if found:
        field, value, most = found[0]
        raise ConfigError(f"{name}: config.json, {field}: got {shown(value)}; allowed: 0 to {most:,}.")
    return config


def _too_many(name: str, value: Any, depth: int) -> Iterator[tuple[str, int, int]]:
    """Yield numbers that would keep the constructor of a model busy for ever: modules are made one by one."""
    if isinstance(value, Mapping | list | tuple) and depth:
        items = value.items() if isinstance(value, Mapping) else ((name, each) for each in value)
        for key, item in items:
            yield from _too_many(str(key), item, depth - 1)
    elif type(value) is int:
        counts = any(word in name for word in _COUNTS)
        most = MAX_MODULES if counts else MAX_SIZE
        if value > most or (counts and value < 0):
            yield name, value, most


def config_and_class(name: str, auto_class: str | None = None) -> tuple[Any, Any]:
    """Return a model's config and the class that loads it.

    Args:
        name: Hub name or folder.
        auto_class: Class of transformers to load with instead of the one that the config names.

    Raises:
        ConfigError: If there is no config, or no such class.
    """
    config = load_config(name)
    named = config.architectures or []
    if not isinstance(named, list | tuple) or not all(isinstance(each, str) for each in named):
        raise ConfigError(f"{name}: config.json, architectures: got {shown(named)}; allowed: a list of class names.")
    wanted = auto_class or next(iter(named), None)
    loader: Any = AutoModel if wanted is None else getattr(transformers, wanted, None)
    if loader is None or not hasattr(loader, "from_pretrained"):
        raise ConfigError(f"{name}: transformers has no class {shown(wanted)}; name another one as auto_class.")
    return config, loader


def load_model(name: str, auto_class: str | None = None) -> PreTrainedModel:
    """Load a model with the class that its config names, in eval mode.

    Args:
        name: Hub name or folder.
        auto_class: Class of transformers to load with instead.

    Raises:
        ConfigError: If the class is unknown or the model cannot be loaded.
    """
    _, loader = config_and_class(name, auto_class)
    with loading(name):
        loaded: PreTrainedModel = loader.from_pretrained(name, trust_remote_code=False).eval()
    return loaded
