"""Integer weights together with uneven sizes: one ``quantization_config`` inside the other."""

from typing import Any

from transformers import PreTrainedModel

from hf_compress.export.pretrained import CompressedConfig, choose_guard, is_uneven


def with_sizes(model: PreTrainedModel, config: Any) -> Any:
    """Return the ``quantization_config`` to store.

    Args:
        model: The model; if its layers differ in size, its config says how.
        config: That of the weights' own format, as an object of transformers or in its stored form.

    Raises:
        ExportError: If transformers alone would load the result without an error, see ``choose_guard``.
    """
    if not is_uneven(model):
        return config
    sizes: Any = model.config.quantization_config
    sizes = sizes if isinstance(sizes, dict) else sizes.to_dict()
    inner = config if isinstance(config, dict) else config.to_dict()
    return CompressedConfig(**{**sizes, "inner": inner, "guard": choose_guard(model, sizes["shapes"])})


def guard_of(config: Any) -> str | None:
    """Return the name of the parameter that is stored with another shape, see ``choose_guard``."""
    return config.guard if isinstance(config, CompressedConfig) else None
