"""Stored integers and steps are the quantizers' own; the library reads them back and computes what was simulated."""

import json

import pytest
import tiny_models
import torch
from quantized_models import FORMAT_CASES, quantized
from safetensors.torch import load_file
from uneven_models import load_in_fresh_process, logits, uneven_bert, uneven_llama

from hf_compress import ExportError, export_quantized
from hf_compress.export.formats.compressed_tensors import pack
from hf_compress.instruments.targets import oriented_weight

pytest.importorskip("compressed_tensors")
MODELS = {"bert": tiny_models.bert, "llama": tiny_models.llama, "uneven": uneven_bert}
PER_ROW_4 = "int4_per_channel"


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 45])
def test_packing_is_the_librarys(num_bits, columns) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    low, high = -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1
    generator = torch.Generator().manual_seed(num_bits)
    integers = torch.randint(low, high + 1, (5, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(pack(integers, num_bits), pack_to_int32(integers, num_bits))


@pytest.mark.parametrize("case", list(FORMAT_CASES))
def test_reloaded_layers_compute_what_was_simulated(case, tmp_path) -> None:
    model = tiny_models.bert()
    found = quantized(model, case)
    export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    reloaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    logits(reloaded)  # the library unpacks weights in the first forward pass
    dynamic = case in ("int8_dynamic", "lsq")
    for layer in found.layers:
        weight = oriented_weight(layer.name, layer.module).detach()
        scale, zero_point = layer.weights.parameters(weight)
        assert torch.equal(stored[f"{layer.name}.weight_scale"].flatten(), scale)
        if zero_point is not None:
            assert torch.equal(stored[f"{layer.name}.weight_zero_point"].flatten().int(), zero_point)
        for role, name in (("inputs", "input"), ("outputs", "output")):
            quantizer = getattr(layer, role)
            if quantizer is not None and not dynamic:
                scale, zero_point = quantizer.parameters()
                assert torch.equal(stored[f"{layer.name}.{name}_scale"], scale)
                if zero_point is not None:
                    assert torch.equal(stored[f"{layer.name}.{name}_zero_point"].int(), zero_point)
        real = reloaded.get_submodule(layer.name)
        simulated = layer.weights.fake_quantize(weight, None, layer.weights.prepare(weight, None))
        assert torch.equal(real.weight, simulated), "integers times steps"
        x = torch.randn(3, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, actual = layer.module(x), real(x)
        if layer.inputs or layer.outputs:  # the last bit, which machines differ in, decides where a value lies on a tie
            assert (expected - actual).pow(2).mean() < 1e-4 * expected.pow(2).mean()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [uneven_bert, uneven_llama])
@pytest.mark.parametrize("case", ["int8_dynamic", PER_ROW_4])
def test_uneven_sizes(make, case, tmp_path) -> None:
    model = make()
    quantized(model, case)
    export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)
    reloaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert tiny_models.relative_error(logits(model), logits(reloaded)) < (0.05 if case == "int8_dynamic" else 1e-5)


def test_transformers_alone_loads_uniform_sizes_and_refuses_uneven_ones(tmp_path) -> None:
    expected = []
    for name, make, case in (
        ("static", tiny_models.bert, "int8_static"),
        ("packed", tiny_models.bert, "int4_weight_only"),
        ("uneven", uneven_bert, "int8_weight_only"),
        ("uneven-packed", uneven_llama, PER_ROW_4),
    ):
        model = make()
        quantized(model, case)
        export_quantized(model, tmp_path / name, "compressed-tensors", verify=False)
        expected.append(logits(model))
    folders = [tmp_path / name for name in ("static", "packed", "uneven", "uneven-packed")]
    results, _ = load_in_fresh_process(folders, tmp_path, plugin=False)
    for real, simulated in zip(results[:2], expected[:2], strict=True):
        torch.testing.assert_close(real, simulated, rtol=1e-4, atol=1e-4)
    assert all(isinstance(error, str) and error.startswith("RuntimeError") for error in results[2:])


def test_layers_of_several_formats_are_named(tmp_path) -> None:
    model = tiny_models.bert()
    rules = [
        {"match": ["attention"], "inputs": False},
        {"match": [r"layer\.1\.output"], "inputs": False, "weights": {"num_bits": 4}},
    ]
    quantized(model, "int8_dynamic", rules=rules)
    export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "mixed-precision"
    by_format = {group["format"]: group["targets"] for group in stored["config_groups"].values()}
    assert by_format["pack-quantized"] == ["bert.encoder.layer.1.output.dense"]
    assert len(stored["config_groups"]) == 3 and stored["ignore"] == ["classifier"]
    reloaded = type(model).from_pretrained(tmp_path / "out")
    assert tiny_models.relative_error(logits(model), logits(reloaded)) < 0.05


def test_one_format_is_for_all_linears_but_those_that_are_ignored(tmp_path) -> None:
    model = tiny_models.ZOO["gpt_neox"]()
    export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = stored["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert stored["ignore"] == [name for name, each in model.named_modules() if each is model.get_output_embeddings()]


@pytest.mark.parametrize(
    ("make", "case", "changes", "message"),
    [
        (tiny_models.gpt2, "int8_dynamic", {}, r"is a Conv1D.*Formats that can: 'onnx', 'dense'"),
        (tiny_models.bert, "int4_weight_only", {"weights": {"symmetric": False, "group_size": 4}}, "zero points"),
        (tiny_models.bert, "int8_dynamic", {"method": "dorefa", "scheme": "int8_weight_only",
         "weights": {"granularity": "tensor"}}, r"weights that are no integers.*Formats that can: 'dense'"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored(make, case, changes, message, tmp_path) -> None:
    model = make()
    quantized(model, case, **changes)
    with pytest.raises(ExportError, match=message):
        export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)
    assert not (tmp_path / "out").exists()


def test_steps_that_the_weights_dtype_would_round_are_refused(tmp_path) -> None:
    model = tiny_models.bert().to(torch.bfloat16)
    export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)  # steps computed in bfloat16
    quantized(model, "lsq")
    with pytest.raises(ExportError, match=r"steps of weights that torch\.bfloat16.*model\.float\(\)"):
        export_quantized(model, tmp_path / "out", "compressed-tensors", verify=False)
