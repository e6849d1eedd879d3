"""Buffers that a model makes anew when it is built, such as rotary frequencies, cut to the units that are left."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.errors import ExportError, shown
from hf_compress.export.names import candidates
from hf_compress.reading import are_positions

WHERE = "config.json, quantization_config.buffers"

Kept = dict[str, dict[int, list[int]]]
"""Buffer name -> dimension -> positions that stay, ascending."""


def checked_buffers(data: Any) -> Kept:
    """Return the stored form with dimensions as integers.

    Raises:
        ExportError: If it is damaged.
    """
    try:
        result = {str(name): {int(dim): kept for dim, kept in dims.items()} for name, dims in (data or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ExportError(f"{WHERE}: expected name -> dimension -> positions, got {str(data)[:80]}.") from error
    for name, dims in result.items():
        for dim, kept in dims.items():
            if dim < 0 or not kept or not are_positions(kept):
                raise ExportError(
                    f"{WHERE}: {name!r} needs dimensions from 0 on and ascending positions along them, got {dim}: "
                    f"{str(kept)[:80]}. The file is damaged or was edited."
                )
    return result


@torch.no_grad()
def slice_buffers(model: PreTrainedModel, buffers: Mapping[str, Mapping[int, list[int]]]) -> None:
    """Cut buffers to the positions that stay.

    Args:
        model: A loaded model, with or without its head; names may be those of the other.
        buffers: See ``checked_buffers``.

    Raises:
        ExportError: If the base model lacks a buffer or it is too small.
    """
    known = dict(model.named_buffers())
    for stored, dims in buffers.items():
        name = next((n for n in candidates(stored, model.base_model_prefix) if n in known), None)
        if name is None:
            raise ExportError(
                f"{WHERE}: the {type(model).__name__} has no buffer {shown(stored)}. The checkpoint is of another "
                "architecture, or of a version of transformers that names buffers differently."
            )
        buffer = known[name]
        for dim, kept in dims.items():
            if dim >= buffer.dim() or kept[-1] >= buffer.shape[dim]:
                raise ExportError(f"{WHERE}: {stored!r} has shape {list(buffer.shape)}, too small for what was kept.")
            buffer = buffer.index_select(dim, torch.tensor(kept, device=buffer.device))
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
