"""Recipes export many small models here; ``tests/export`` checks that what is written is loaded again and compared."""

import pytest

import hf_compress.export.quantized as exporting


@pytest.fixture(autouse=True)
def _exports_are_not_loaded_again(monkeypatch) -> None:
    monkeypatch.setattr(exporting, "verify_export", lambda folder, format, reference: None)
