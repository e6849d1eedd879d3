"""What was written is loaded in a fresh process before it takes its place."""

import pytest
import tiny_models
import torch
from uneven_models import files, uneven_bert

from hf_compress import ExportError, export_quantized
from hf_compress.export.formats.dense import Dense


def test_a_good_export_passes(tmp_path) -> None:
    export_quantized(uneven_bert(), tmp_path / "out", "dense")
    assert (tmp_path / "out" / "config.json").is_file()


def test_other_numbers_are_an_error_and_the_target_stays(tmp_path, monkeypatch) -> None:
    model, write = tiny_models.bert(), Dense.write
    model.save_pretrained(tmp_path / "out")
    before = files(tmp_path / "out")

    def damaged(self, duplicate, layers, folder, inputs) -> None:
        layers[0].module.weight.data[0] *= 3
        write(self, duplicate, layers, folder, inputs)

    monkeypatch.setattr(Dense, "write", damaged)
    with pytest.raises(ExportError, match=r"logits differs from the model with fake quantizers.*verify=False"):
        export_quantized(model, tmp_path / "out", "dense")
    assert files(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_model_that_does_not_load_is_an_error(tmp_path, monkeypatch) -> None:
    def empty(self, duplicate, layers, folder, inputs) -> None:
        duplicate.config.save_pretrained(folder)

    monkeypatch.setattr(Dense, "write", empty)
    with pytest.raises(ExportError, match="does not load in a fresh process: OSError"):
        export_quantized(tiny_models.bert(), tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_checked_says_so(tmp_path) -> None:
    class Mine(type(tiny_models.bert())):
        pass

    model = tiny_models.bert()
    model.__class__ = Mine
    with pytest.raises(ExportError, match=r"Mine is defined in .*pass verify=False"):
        export_quantized(model, tmp_path / "out", "dense")
    inputs = {"input_ids": torch.full((1, 3), 10_000)}
    with pytest.raises(ExportError, match=r"does not run on example inputs \(IndexError.*verify=False"):
        export_quantized(tiny_models.bert(), tmp_path / "out", "dense", example_inputs=inputs)
    with pytest.raises(ExportError, match="example_inputs have no effect"):
        export_quantized(tiny_models.bert(), tmp_path / "out", "dense", example_inputs=inputs, verify=False)
