"""Loading models by the class that their config names, with one message where that fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from hf_compress.errors import CompressionError, ConfigError, shown

MAX_MODULES = 10_000
"""Layers, blocks or experts of one kind."""

MAX_EXPERTS = 1 << 17
"""Experts of all layers."""

MAX_LABELS = 1 << 20
"""Classes: configs make a name for each as they are read."""

MAX_SIZE = 1 << 36
"""Of any number in a config."""

MAX_MESSAGE = 1500
"""Characters of what another library said about files, which may quote them."""

SAFE: Mapping[str, bool] = {"trust_remote_code": False, "use_safetensors": True}
"""Options of ``from_pretrained`` with which a model's files cannot run anything: no scripts, no pickled weights."""

MAX_NESTING = 8
"""Configs in each other."""

_ALL_CONFIGS = "Model type should be one of"
"""Before the names of all configs that a class of transformers knows, which help nobody."""

_COUNTS = ("layers", "n_layer", "depth", "blocks", "experts", "stages")
"""What names of fields have in them that say how many modules there are."""

_CHECKED_ELSEWHERE = "quantization_config"
"""Its keys may be names of parameters, with "layers" in them; ``CompressedConfig`` checks its sizes."""


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
        text = " ".join(str(error).split()).partition(_ALL_CONFIGS)[0].rstrip()
        text = "".join(each if each.isprintable() else "?" for each in text[:MAX_MESSAGE])
        here = (
            " There is no such folder here, either." if isinstance(error, OSError) and not Path(name).exists() else ""
        )
        raise ConfigError(f"{name}: cannot be loaded: {type(error).__name__}: {text}{here}") from error


def load_config(name: str) -> Any:
    """Return the config of a model.

    Raises:
        ConfigError: If there is none, or it asks for more than any computer can hold.
    """
    with loading(name):
        stored, _ = PretrainedConfig.get_config_dict(name)
        _check_numbers(name, stored)  # before a class makes lists as long as they say
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # asked about it, a script would wait
        _check_numbers(name, config.to_dict())
    return config


def _check_numbers(name: str, stored: Mapping[str, Any]) -> None:
    """Refuse numbers that would keep a constructor busy for ever: modules are made one by one."""
    numbers = list(_numbers("", stored, MAX_NESTING))
    counts: dict[bool, tuple[int, str]] = {False: (0, ""), True: (0, "")}
    for field, value in numbers:
        is_count = any(word in field for word in _COUNTS)
        most = MAX_MODULES if is_count else MAX_LABELS if field == "num_labels" else MAX_SIZE
        if value > most or (is_count and value < 0):
            raise ConfigError(f"{name}: config.json, {field}: got {shown(value)}; allowed: 0 to {most:,}.")
        if is_count:
            counts["experts" in field] = max(counts["experts" in field], (value, field))
    (layers, one), (experts, other) = counts[False], counts[True]
    if layers * experts > MAX_EXPERTS:
        raise ConfigError(
            f"{name}: config.json, {one} and {other}: got {layers:,} times {experts:,}; allowed: up to "
            f"{MAX_EXPERTS:,} in all."
        )


def _numbers(name: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Yield every integer with the field that it is in; of a list of counts, such as ``depths``, its sum as well."""
    if isinstance(value, Mapping) and depth:
        for key, item in value.items():
            if key != _CHECKED_ELSEWHERE:
                yield from _numbers(str(key), item, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        if "depth" in name or "num_" in name:  # others list which layers are of a kind
            yield name, sum(item for item in value if type(item) is int)
        for item in value:
            yield from _numbers(name, item, depth - 1)
    elif type(value) is int:
        yield name, value


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


def check_weights(name: str) -> None:
    """Check that a folder does not hold pickled weights alone, which are not loaded: unpickling may run code.

    Raises:
        ConfigError: If it does.
    """
    folder = Path(name)
    pickled = sorted(folder.glob("*_model*.bin")) if folder.is_dir() else []  # a model's or an adapter's
    if pickled and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{name}: its weights are pickled ({pickled[0].name}), which could run code when they are loaded; allowed: "
            "safetensors. If you trust the file, convert it: load the model with transformers and call save_pretrained."
        )


def load_model(name: str, auto_class: str | None = None) -> PreTrainedModel:
    """Load a model with the class that its config names, in eval mode.

    Args:
        name: Hub name or folder.
        auto_class: Class of transformers to load with instead.

    Raises:
        ConfigError: If the class is unknown or the model cannot be loaded.
    """
    _, loader = config_and_class(name, auto_class)
    check_weights(name)
    with loading(name):
        loaded: PreTrainedModel = loader.from_pretrained(name, **SAFE).eval()
    return loaded
