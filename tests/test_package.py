import subprocess
import sys

import pytest
import transformers

import hf_compress


def test_every_public_name_exists() -> None:
    assert sorted(hf_compress.__all__) == hf_compress.__all__
    assert all(hasattr(hf_compress, name) for name in hf_compress.__all__)


def test_auto_classes_are_transformers_own() -> None:
    assert hf_compress.AutoModelForSequenceClassification is transformers.AutoModelForSequenceClassification
    with pytest.raises(AttributeError, match="no attribute 'AutoModelForNothing'"):
        _ = hf_compress.AutoModelForNothing


def test_importing_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", "import hf_compress"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
