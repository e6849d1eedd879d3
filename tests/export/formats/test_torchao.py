import pytest
import tiny_models
import torch
from quantized_models import quantized
from safetensors.torch import load_file
from uneven_models import load_in_fresh_process, logits, uneven_bert

from hf_compress import ExportError, QuantizationConfig, export_quantized

pytest.importorskip("torchao")


@pytest.mark.parametrize("make", [tiny_models.bert, uneven_bert])
@pytest.mark.parametrize("case", ["int8_weight_only", "lsq", "lsq_weight_only"])
def test_steps_are_stored_and_layers_compute_what_was_simulated(case, make, tmp_path) -> None:
    model = make()
    found = quantized(model, case)
    export_quantized(model, tmp_path / "out", verify=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    reloaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for layer in found.layers:
        scale, _ = layer.weights.parameters(layer.module.weight)
        assert torch.equal(stored[f"{layer.name}._weight_scale"].flatten(), scale)
        expected = torch.round(layer.module.weight * (1 / scale[:, None])).clamp(-128, 127)
        assert torch.equal(stored[f"{layer.name}._weight_qdata"].float(), expected)
        x = torch.randn(3, 5, layer.module.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(reloaded.get_submodule(layer.name)(x), layer.module(x), rtol=1e-5, atol=1e-5)


def test_layers_may_differ_and_transformers_alone_loads_them(tmp_path) -> None:
    model = tiny_models.bert()
    quantized(model, "int8_dynamic", rules=[{"match": [r"layer\.0"], "inputs": False}])
    export_quantized(model, tmp_path / "out", verify=False)
    (real,), _ = load_in_fresh_process([tmp_path / "out"], tmp_path, plugin=False)
    assert not isinstance(real, str), real
    assert tiny_models.relative_error(logits(model), real) < 0.05


def test_a_config_says_the_numbers_of_a_model_without_quantizers(tmp_path) -> None:
    model = tiny_models.bert()
    config = QuantizationConfig(scheme="int8_weight_only", exclude=("classifier", r"layer\.0"))
    export_quantized(model, tmp_path / "out", config=config, verify=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    integers = {name.rpartition(".")[0] for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert integers and not any("layer.0" in name for name in integers) and "bert.pooler.dense" in integers
    with pytest.raises(ExportError, match="say it in the config"):
        export_quantized(model, tmp_path / "out", exclude=("classifier",), config=config, verify=False)
    with pytest.raises(ExportError, match="has to be observed"):
        export_quantized(model, tmp_path / "out", config=QuantizationConfig(scheme="int8_static"), verify=False)
    with pytest.raises(ExportError, match="steps have to be trained"):
        export_quantized(model, tmp_path / "out", config=QuantizationConfig(method="lsq"), verify=False)


@pytest.mark.parametrize(
    ("make", "case", "message"),
    [
        (tiny_models.bert, "int4_weight_only", r"symmetric weights per channel.*'compressed-tensors', 'onnx', 'dense'"),
        (tiny_models.bert, "int8_static", r"dynamic inputs per token, or none.*'compressed-tensors', 'onnx', 'dense'"),
        (tiny_models.gpt2, "int8_dynamic", r"is a Conv1D.*Formats that can: 'onnx', 'dense'"),
    ],
)
def test_other_numbers_raise_and_name_formats_that_can(make, case, message, tmp_path) -> None:
    model = make()
    quantized(model, case)
    with pytest.raises(ExportError, match=message):
        export_quantized(model, tmp_path / "out", verify=False)
