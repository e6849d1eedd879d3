"""Names of a checkpoint, which may be those of the model with its head or of the base model alone."""

from collections.abc import Container, Iterable


def candidates(name: str, prefix: str) -> tuple[str, ...]:
    """Return what ``name`` may be called in the model at hand.

    Args:
        name: Name in the checkpoint.
        prefix: The model's ``base_model_prefix``.
    """
    if name == prefix:
        return name, ""
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def resolve(names: Iterable[str], known: Container[str], prefix: str) -> list[str]:
    """Return the names as the model at hand has them, without those that it lacks."""
    found = (next((c for c in candidates(name, prefix) if c in known), None) for name in names)
    return [name for name in found if name is not None]
