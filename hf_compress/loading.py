"""Loading models by the class that their config names, with one message where that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_compress.errors import CompressionError, ConfigError


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
        raise ConfigError(f"{name}: cannot be loaded: {type(error).__name__}: {text}") from error


def load_config(name: str) -> Any:
    """Return the config of a model.

    Raises:
        ConfigError: If there is none.
    """
    with loading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)  # asked about it, a script would wait


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
        raise ConfigError(f"{name}: config.json, architectures: got {named!r}; allowed: a list of class names.")
    wanted = auto_class or next(iter(named), None)
    loader: Any = AutoModel if wanted is None else getattr(transformers, wanted, None)
    if loader is None or not hasattr(loader, "from_pretrained"):
        raise ConfigError(f"{name}: transformers has no class {wanted!r}; name another one as auto_class.")
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
