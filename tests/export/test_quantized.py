import json
import os
import sys

import pytest
import tiny_models
import torch
from quantized_models import install_quantizers, on_int8_grid
from row_numerics import quantize, symmetric_scale
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)
from uneven_models import example_ids, files, logits, uneven_bert, uneven_llama

from hf_compress.config import QuantizationConfig
from hf_compress.errors import ExportError, TargetError
from hf_compress.export.quantized import export_quantized
from hf_compress.instruments.attach import attach
from hf_compress.instruments.fake_quantize import quantizable_layers

MODELS = {"uniform": tiny_models.bert, "uneven": uneven_bert, "uneven without biases": uneven_llama}
both_sizes = pytest.mark.parametrize("make", list(MODELS.values()), ids=list(MODELS))


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao")


def rms(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def contents(path) -> tuple[dict, dict]:
    """What a safetensors file holds, whatever the order of its header."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.usefixtures("torchao")
class TestTorchao:
    @both_sizes
    def test_scales_and_integers_are_those_of_training(self, make, tmp_path) -> None:
        model = make()
        export_quantized(model, tmp_path / "int8", verify=False)
        stored = load_file(tmp_path / "int8" / "model.safetensors")
        linears = quantizable_layers(model)
        assert linears
        for name, layer in linears.items():
            scale = symmetric_scale(layer.weight)
            assert stored[f"{name}._weight_qdata"].dtype == torch.int8
            assert torch.equal(stored[f"{name}._weight_scale"], scale)
            assert torch.equal(stored[f"{name}._weight_qdata"], quantize(layer.weight, scale))
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") not in linears:
                assert torch.equal(stored[name].flatten(), parameter.flatten()), name

    @both_sizes
    def test_each_layer_computes_what_was_simulated(self, make, tmp_path) -> None:
        model = make()
        export_quantized(model, tmp_path / "int8", verify=False)
        reloaded = type(model).from_pretrained(tmp_path / "int8")
        generator = torch.Generator().manual_seed(0)
        linears = quantizable_layers(model)
        install_quantizers(linears)
        for name, layer in linears.items():
            real = reloaded.get_submodule(name)
            assert (real.in_features, real.out_features) == (layer.in_features, layer.out_features)
            x = torch.randn(4, 7, layer.in_features, generator=generator)
            with torch.no_grad():
                torch.testing.assert_close(real(x), layer(x), rtol=1e-5, atol=1e-5)

    @both_sizes
    @pytest.mark.parametrize("seed", range(3))
    def test_fake_quantized_logits_equal_the_exported_ones_within_the_noise_of_the_kernel(
        self, make, seed, tmp_path
    ) -> None:
        """Layers agree to 1e-6, but each token's largest negative value lies on a tie (-127.5 steps) that the last
        bit decides, so outputs differ by whole steps of some values: less than quantization itself changes them.
        """
        model, ids = tiny_models.randomize(make(), seed), example_ids(batch=32, seed=seed)
        plain = logits(model, ids)
        install_quantizers(quantizable_layers(model))
        fake = logits(model, ids)
        export_quantized(model, tmp_path / "int8", verify=False)
        real = logits(type(model).from_pretrained(tmp_path / "int8"), ids)
        assert rms(fake - real) < rms(fake - plain)
        assert rms(fake - real) < 0.02 * rms(plain)

    @pytest.mark.parametrize("make", [uneven_bert, uneven_llama])
    def test_uneven_sizes_saved_again_are_the_same(self, make, tmp_path) -> None:
        export_quantized(make(), tmp_path / "first", verify=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert not any(info.values())
        before = logits(model)
        model.save_pretrained(tmp_path / "second")
        first, second = files(tmp_path / "first"), files(tmp_path / "second")
        assert first.keys() == second.keys()
        assert first["config.json"] == second["config.json"]
        (metadata, tensors), (other_metadata, other_tensors) = (
            contents(tmp_path / name / "model.safetensors") for name in ("first", "second")
        )
        assert metadata == other_metadata
        assert tensors.keys() == other_tensors.keys()
        assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")), before)

    def test_a_checkpoint_of_other_sizes_is_refused(self, tmp_path) -> None:
        export_quantized(uneven_bert(), tmp_path / "int8", verify=False)
        config = tmp_path / "int8" / "config.json"
        stored = json.loads(config.read_text())
        stored["quantization_config"]["shapes"]["bert.encoder.layer.0.intermediate.dense.weight"] = [12, 32]
        config.write_text(json.dumps(stored))
        with pytest.raises(ExportError, match=r"intermediate\.dense\.weight.*has shape \[10, 32\].*says \[12, 32\]"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")

    def test_loading_without_torchao_says_what_to_install(self, tmp_path, monkeypatch) -> None:
        export_quantized(uneven_bert(), tmp_path / "int8", verify=False)
        monkeypatch.setitem(sys.modules, "torchao.core.config", None)
        with pytest.raises(ExportError, match=r"torchao format.*pip install 'hf-compress\[int8\]'"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")

    def test_equal_models_give_equal_bytes(self, tmp_path) -> None:
        model = tiny_models.bert()
        for name in ("a", "b", "c"):
            export_quantized(model, tmp_path / name, verify=False)
        assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")

    def test_weights_take_a_quarter_of_the_space(self, tmp_path) -> None:
        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 10}
        model = tiny_models.bert(**sizes, max_position_embeddings=8)
        model.save_pretrained(tmp_path / "float")
        export_quantized(model, tmp_path / "int8", verify=False)
        before, after = (os.path.getsize(tmp_path / name / "model.safetensors") for name in ("float", "int8"))
        assert after < 0.3 * before

    def test_tied_embeddings_stay_tied(self, tmp_path) -> None:
        model = tiny_models.bert_mlm()
        export_quantized(model, tmp_path / "int8", verify=False)
        reloaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "int8", output_loading_info=True)
        assert not any(info.values())
        assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
        assert tiny_models.relative_error(logits(model), logits(reloaded)) < 0.1

    def test_excluded_layers_stay_in_floating_point(self, tmp_path) -> None:
        model = tiny_models.bert()
        export_quantized(model, tmp_path / "int8", exclude=("classifier", r"layer\.0"), verify=False)
        reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "int8")
        stored = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
        assert {n for n in stored["modules_to_not_convert"] if "layer.0" not in n} == {"classifier"}
        floats = {n for n, m in reloaded.named_modules() if isinstance(m, nn.Linear) and type(m.weight) is nn.Parameter}
        assert floats == {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer.1" not in n} - {
            "bert.pooler.dense"
        }

    @both_sizes
    def test_bfloat16_weights(self, make, tmp_path) -> None:
        model = make().to(torch.bfloat16)
        export_quantized(model, tmp_path / "int8", verify=False)
        reloaded = type(model).from_pretrained(tmp_path / "int8", dtype="auto")
        assert reloaded.dtype == torch.bfloat16
        assert tiny_models.relative_error(logits(model).float(), logits(reloaded).float()) < 0.1

    def test_a_quantized_model_is_refused(self, tmp_path) -> None:
        for make in MODELS.values():
            export_quantized(make(), tmp_path / "int8", verify=False)
            reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
            with pytest.raises(ExportError, match="quantized already"):
                export_quantized(reloaded, tmp_path / "again", verify=False)
        assert not (tmp_path / "again").exists()


@both_sizes
def test_dense_weights_lie_on_the_grid_and_load_everywhere(make, tmp_path) -> None:
    model = make()
    export_quantized(model, tmp_path / "dense", format="dense", verify=False)
    reloaded, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    for name, layer in quantizable_layers(model).items():
        expected = on_int8_grid(layer.weight)
        assert torch.equal(reloaded.get_submodule(name).weight, expected)
        assert not torch.equal(layer.weight, expected)
    assert tiny_models.relative_error(logits(model), logits(reloaded)) < 0.1


@pytest.mark.parametrize("attached", [False, True])
def test_the_model_itself_is_not_changed(attached, tmp_path) -> None:
    model = uneven_bert()
    if attached:
        install_quantizers(quantizable_layers(model))
    before, config = logits(model), model.config.to_json_string()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_quantized(model, tmp_path / "dense", format="dense", verify=False)
    assert torch.equal(logits(model), before)
    assert model.config.to_json_string() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_quantizers_is_stored_with_those(tmp_path) -> None:
    model = tiny_models.bert()
    install_quantizers(quantizable_layers(model, ("classifier", "pooler")))
    with pytest.raises(ExportError, match=r"first difference: 'bert\.pooler\.dense'"):
        export_quantized(model, tmp_path / "dense", format="dense", exclude=("classifier",), verify=False)
    with pytest.raises(ExportError, match="has quantizers already"):
        export_quantized(model, tmp_path / "dense", format="dense", config=QuantizationConfig(), verify=False)
    export_quantized(model, tmp_path / "dense", format="dense", verify=False)
    reloaded = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(reloaded.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    query = model.bert.encoder.layer[0].attention.self.query.weight
    assert torch.equal(reloaded.bert.encoder.layer[0].attention.self.query.weight, on_int8_grid(query))


def test_gates_raise(tmp_path) -> None:
    model = tiny_models.bert()
    dense = model.bert.pooler.dense
    attach("pooler", dense).input_gates.append(lambda: torch.ones(32))
    with pytest.raises(ExportError, match=r"call shrink\(\) first"):
        export_quantized(model, tmp_path / "dense", format="dense", verify=False)


def test_an_unknown_format_and_an_unknown_pattern_raise(tmp_path) -> None:
    with pytest.raises(ExportError, match="unknown format 'torch_ao'; closest match: 'torchao'"):
        export_quantized(tiny_models.bert(), tmp_path / "out", format="torch_ao", verify=False)
    with pytest.raises(TargetError, match="'nothing' matches no layer"):
        export_quantized(tiny_models.bert(), tmp_path / "out", format="dense", exclude=("nothing",), verify=False)
    with pytest.raises(ExportError, match=r"torch\.float64; allowed: torch\.float32"):
        export_quantized(tiny_models.bert().double(), tmp_path / "out", format="dense", verify=False)
    assert not (tmp_path / "out").exists()


def test_without_torchao_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ExportError, match=r"pip install 'hf-compress\[int8\]'"):
        export_quantized(tiny_models.bert(), tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
    export_quantized(tiny_models.bert(), tmp_path / "out", format="dense", verify=False)


def test_a_folder_that_holds_no_model_is_left_alone(tmp_path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="holds files but no model"):
        export_quantized(tiny_models.bert(), tmp_path / "notes", format="dense", verify=False)
    with pytest.raises(ExportError, match="is a file"):
        export_quantized(tiny_models.bert(), tmp_path / "notes" / "thesis.txt", format="dense", verify=False)
    assert files(tmp_path / "notes") == {"thesis.txt": b"years of work"}


def test_a_model_folder_is_replaced_and_its_other_files_stay(tmp_path) -> None:
    out = tmp_path / "out"
    tiny_models.bert(num_labels=2).save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    (out / "tokenizer.json").write_text("{}")
    model = tiny_models.bert()
    export_quantized(model, out, format="dense", verify=False)
    export_quantized(model, tmp_path / "clean", format="dense", verify=False)
    assert files(out) == {**files(tmp_path / "clean"), "tokenizer.json": b"{}"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "clean"}, "temporary folders were left behind"


def test_failing_while_saving_leaves_the_old_model_as_it_was(tmp_path, monkeypatch) -> None:
    out, model = tmp_path / "out", tiny_models.bert()
    model.save_pretrained(out)
    before = files(out)

    def full_disk(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half a mod")
        raise OSError("No space left on device")

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_quantized(model, out, format="dense", verify=False)
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json"])
def test_dying_while_moving_leaves_nothing_that_loads(victim, tmp_path, monkeypatch) -> None:
    out, move = tmp_path / "out", os.replace
    tiny_models.bert(num_labels=2).save_pretrained(out)

    def die(source, target):
        if target.name == victim:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        export_quantized(tiny_models.bert(), out, format="dense", verify=False)
    assert not (out / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(out)


def test_the_base_model_is_loaded_with_its_head(tmp_path, torchao) -> None:
    """A limit of Transformers: once the first part fails no more, it is to go from the README's limits."""
    folder = export_quantized(tiny_models.bert(), tmp_path / "int8", verify=False)
    with pytest.raises(RuntimeError, match="CONVERSION"):
        AutoModel.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder).base_model
    assert base(example_ids()).last_hidden_state.isfinite().all()


def test_the_folder_of_the_model_itself_is_refused(tmp_path) -> None:
    tiny_models.bert().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match=r"was loaded from.*Choose another folder"):
        export_quantized(model, tmp_path, "dense", verify=False)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
