"""The model that a config describes, on the meta device: every shape, no weights."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.errors import ConfigError
from hf_compress.export.attributes import change_modules, set_attributes
from hf_compress.export.buffers import slice_buffers
from hf_compress.export.pretrained import CompressedConfig, resize_parameters, stored_method
from hf_compress.shrinking.sizes import METHOD

MAX_DIMENSION = 1 << 28
"""Of a parameter: what belongs together is found position by position."""


def build_skeleton(config: Any, model_class: Any) -> PreTrainedModel:
    """Build a model without weights; of a compressed model, with the sizes that it really has.

    Args:
        config: Config of the model, as ``AutoConfig`` loads it.
        model_class: A model class of transformers, or an Auto class.

    Raises:
        ConfigError: If the class cannot be built from the config, or has larger dimensions than can be analyzed.
        ExportError: If the sizes stored in the config do not fit the architecture.
    """
    build = getattr(model_class, "from_config", model_class)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = build(config).eval()
    # Constructors of models fail in whatever way their code does.
    except Exception as error:
        raise ConfigError(
            f"{config.name_or_path}: {model_class.__name__} cannot be built from a {type(config).__name__} "
            f"({type(error).__name__}: {' '.join(str(error).split())}). "
            "Choose the class with --auto-class."
        ) from error
    for name, parameter in model.named_parameters():
        if max(parameter.shape, default=0) > MAX_DIMENSION:
            raise ConfigError(
                f"{config.name_or_path}: config.json gives {name!r} the shape {list(parameter.shape)}; allowed: up to "
                f"{MAX_DIMENSION:,} a dimension. Mend the field that it is made from."
            )
    if stored_method(model) == METHOD:
        stored = config.quantization_config
        sizes = stored if isinstance(stored, CompressedConfig) else _parsed(stored)
        change_modules(model, sizes.emptied, sizes.flexible)
        resize_parameters(model, sizes.shapes)
        set_attributes(model, sizes.attributes)
        slice_buffers(model, sizes.buffers)
    return model


def _parsed(stored: Mapping[str, Any]) -> CompressedConfig:
    return CompressedConfig(**stored)
