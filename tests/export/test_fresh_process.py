"""What a user does: save here, load there. One process of transformers alone, one with the plugin."""

import pytest
import tiny_models
import torch
from transformers import AutoModelForSequenceClassification
from uneven_models import load_in_fresh_process, logits, uneven_bert, uneven_llama

from hf_compress.export.quantized import export_quantized


def reloaded_logits(folder):
    return logits(AutoModelForSequenceClassification.from_pretrained(folder))


@pytest.fixture(autouse=True)
def _one_thread_as_in_the_other_process():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_transformers_alone_loads_uniform_sizes_and_refuses_uneven_ones(tmp_path) -> None:
    pytest.importorskip("torchao")
    export_quantized(tiny_models.bert(), tmp_path / "int8", verify=False)
    export_quantized(tiny_models.bert(), tmp_path / "dense", format="dense", verify=False)
    uneven_bert().save_pretrained(tmp_path / "uneven")
    export_quantized(uneven_bert(), tmp_path / "uneven-int8", verify=False)
    export_quantized(uneven_llama(), tmp_path / "no-biases-int8", verify=False)
    folders = [tmp_path / name for name in ("int8", "dense", "uneven", "uneven-int8", "no-biases-int8")]
    (int8, dense, *uneven), stderr = load_in_fresh_process(folders, tmp_path, plugin=False)
    assert torch.equal(int8, reloaded_logits(folders[0]))
    assert torch.equal(dense, reloaded_logits(folders[1]))
    assert all(isinstance(error, str) and error.startswith("RuntimeError") for error in uneven)
    assert "Unknown quantization type, got hf_compress" in stderr


def test_with_the_plugin_uneven_sizes_load_bit_identically(tmp_path) -> None:
    pytest.importorskip("torchao")
    model = uneven_bert()
    model.save_pretrained(tmp_path / "float")
    export_quantized(model, tmp_path / "int8", verify=False)
    export_quantized(uneven_llama(), tmp_path / "no-biases-int8", verify=False)
    folders = [tmp_path / name for name in ("float", "int8", "no-biases-int8")]
    (plain, int8, no_biases), _ = load_in_fresh_process(folders, tmp_path, plugin=True)
    assert torch.equal(plain, logits(model))
    assert torch.equal(int8, reloaded_logits(folders[1]))
    assert torch.equal(no_biases, reloaded_logits(folders[2]))
