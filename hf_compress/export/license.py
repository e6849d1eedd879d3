"""The license of a base model, which what is made of it inherits."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers.utils.hub import cached_file

from hf_compress.export.card import CARD
from hf_compress.reading import read_text

FIELDS = ("license", "license_name", "license_link")


def license_of(model: str) -> dict[str, Any]:
    """Return what the card of a model says about its license.

    Args:
        model: Hub name or folder.

    Returns:
        ``license``, and ``license_name`` and ``license_link`` where the card has them; nothing if there is no card, it
        cannot be reached or read, or names several licenses.
    """
    try:
        path = cached_file(
            model,
            CARD,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return {}
        card = ModelCard(read_text(Path(path)), ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a base model's card is no reason to fail
        return {}
    found = {name: card.data.get(name) for name in FIELDS}
    return {
        name: value for name, value in found.items() if isinstance(value, str) and isinstance(found["license"], str)
    }
