"""Errors of the package: every message says where, what was given, what is allowed and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class CompressionError(Exception):
    """Base class of every error that hf_compress raises on purpose."""


class ConfigError(CompressionError, ValueError):
    """A setting that is unknown, out of range, contradictory or without effect."""


class TargetError(CompressionError):
    """A requested structure, module or budget that the model cannot provide or that was not reached."""


class GraphError(CompressionError):
    """The model's forward pass could not be captured or analyzed."""


class ShrinkError(CompressionError):
    """A plan that cannot be applied, or a shrunk model that differs from the masked one."""


class ExportError(CompressionError):
    """A model that cannot be saved in, or loaded from, the requested format."""


class TrainingError(CompressionError):
    """A Trainer setup in which a callback would silently do nothing or do it wrongly."""


class SweepError(CompressionError):
    """Runs of a sweep that failed; the others are finished."""


def message_of(error: CompressionError | OSError) -> str:
    """Return what a command says of an error that is not a fault of the program.

    Raises:
        OSError: The error itself, if it names no file or folder.
    """
    if isinstance(error, CompressionError):
        return str(error)
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}. Name another file or folder, or mend its permissions."


MAX_SHOWN = 300
"""Characters of a value in a message; files of others may hold megabytes."""


def shown(given: object) -> str:
    """Return a value as Python writes it, cut to a readable length."""
    text = repr(given)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def choices(given: object, allowed: Iterable[object]) -> str:
    """Describe allowed names, or None, True and False among them, the closest match to ``given`` first if there is one.

    Returns:
        Text such as ``"closest match: 'taylor'; allowed: 'l2', 'taylor'"``.
    """
    names = sorted(allowed, key=str)
    listed = "allowed: " + (", ".join(repr(name) for name in names) or "none")
    close = get_close_matches(
        str(given)[:MAX_SHOWN], [name for name in names if isinstance(name, str)], n=1, cutoff=0.5
    )
    return f"closest match: {close[0]!r}; {listed}" if close else listed
