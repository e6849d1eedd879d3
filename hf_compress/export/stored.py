"""What the weight files of a checkpoint hold, read from their headers."""

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from hf_compress.errors import ExportError
from hf_compress.export.names import candidates


def stored_shapes(files: Sequence[Any] | None) -> dict[str, list[int]] | None:
    """Return the shape of every stored tensor by name, or None if the files have no headers to read.

    Raises:
        ExportError: If a file is damaged.
    """
    shapes: dict[str, list[int]] = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            return None
        try:
            with safe_open(file, framework="pt") as content:
                shapes.update((name, list(content.get_slice(name).get_shape())) for name in content.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{file}: cannot be read ({error}). Copy or download it again.") from error
    return shapes


def follow_resizing(
    model: PreTrainedModel, shapes: Mapping[str, list[int]], stored: Mapping[str, list[int]] | None
) -> dict[str, list[int]]:
    """Return the shapes with as many rows as the files have, where the config agrees with the files.

    ``resize_token_embeddings`` changes the config and the rows of the embeddings; only their width was pruned.

    Args:
        model: The empty model, of the sizes that its config gives.
        shapes: Shapes of the pruned parameters when the model was shrunk.
        stored: See ``stored_shapes``.
    """
    given = {name: list(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    result = dict(shapes)
    for name, shape in shapes.items():
        names = [name, model.all_tied_weights_keys.get(name, name)]
        found = [c for n in names for c in candidates(n, model.base_model_prefix) if c in (stored or {})]
        actual = stored[found[0]] if found and stored is not None else shape
        if actual[1:] == shape[1:] and actual[:1] == given.get(name, [])[:1]:
            result[name] = actual
    return result
