"""Marks of tests whose expectation is that of newer versions of other libraries than the oldest that are allowed."""

from importlib.metadata import version

import pytest
from packaging.version import Version

TESTED_TRANSFORMERS = "5.23"
"""The oldest one that the whole suite has been run with."""


def needs_newer_transformers(reason: str) -> pytest.MarkDecorator:
    """Skip a test with a Transformers that is allowed, but older than what the whole suite runs with."""
    return pytest.mark.skipif(Version(version("transformers")) < Version(TESTED_TRANSFORMERS), reason=reason)
