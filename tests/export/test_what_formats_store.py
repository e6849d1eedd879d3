"""What a format cannot store, or would not do, is refused; and the check in a fresh process sees wrong integers."""

import dataclasses
import json

import pytest
import tiny_models
import torch

import hf_compress.export.formats.compressed_tensors as compressed_tensors
from hf_compress import (
    ConfigError,
    ExportError,
    QuantizationConfig,
    TargetError,
    apply_calibration_config,
    calibrate,
    calibration_config,
    export_quantized,
    make_example_inputs,
    quantization_sensitivity,
)

PERCENTILE = {"dynamic": True, "observer": "percentile", "observer_options": {"percentile": 90.0}}


def ptq(**settings) -> QuantizationConfig:
    return QuantizationConfig(method="ptq", **settings)


@pytest.mark.parametrize("format", ["compressed-tensors", "onnx", "torchao"])
def test_ranges_that_no_format_computes_are_refused(format, tmp_path) -> None:
    model = tiny_models.bert()
    calibrate(model, None, ptq(inputs={**PERCENTILE, "granularity": "tensor"}))
    with pytest.raises(ExportError, match=r"at every call by observer 'percentile'|needs int8 symmetric dynamic"):
        export_quantized(model, tmp_path / "out", format, verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 8])
def test_other_integers_are_seen_where_inputs_are_dynamic(bits, tmp_path, monkeypatch) -> None:
    pytest.importorskip("compressed_tensors")
    model = tiny_models.bert()
    calibrate(model, None, ptq(weights={"num_bits": bits}))
    export_quantized(model, tmp_path / "right", "compressed-tensors")
    real = compressed_tensors.stored_weight

    def zeros(layer):
        stored = real(layer)
        return dataclasses.replace(stored, integers=torch.zeros_like(stored.integers))

    monkeypatch.setattr(compressed_tensors, "stored_weight", zeros)
    with pytest.raises(ExportError, match="differs from the model with fake quantizers"):
        export_quantized(model, tmp_path / "wrong", "compressed-tensors")


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_has_dynamic_ranges_of_whole_tensors(symmetric, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny_models.bert()
    calibrate(model, None, ptq(inputs={"granularity": "tensor", "dynamic": True, "symmetric": symmetric}))
    export_quantized(model, tmp_path / "out", "onnx")  # checked against the fake quantizers
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ptq", "scheme": "int8_weight_only", "options": {"rounding": "gptq"}},
        {"method": "ptq", "options": {"smooth": 0.5}},
        {"begin": 0.5},
        {"method": "dorefa", "weights": {"num_bits": 4, "granularity": "tensor"}, "inputs": False,
         "options": {"gradient_bits": 8}},
    ],
)  # fmt: skip
def test_a_config_that_would_have_no_effect_is_refused(settings, tmp_path) -> None:
    with pytest.raises(ExportError, match="which acts while a model trains or is calibrated"):
        export_quantized(
            tiny_models.bert(), tmp_path / "out", "dense", config=QuantizationConfig(**settings), verify=False
        )
    assert not (tmp_path / "out").exists()


def test_dense_stores_weights(tmp_path) -> None:
    with pytest.raises(ExportError, match="nothing would be"):
        export_quantized(tiny_models.bert(), tmp_path / "out", "dense", config=ptq(targets=["attention"]), verify=False)


@pytest.mark.parametrize(
    ("directory", "config", "message"),
    [
        (None, None, "directory=None; allowed: the name of a folder"),
        ("out", {"scheme": "int8_dynamic"}, "config is a dict; pass a QuantizationConfig"),
        ("/proc/nothing/out", None, "cannot be written"),
    ],
)
def test_arguments_that_are_none(directory, config, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=message):
        export_quantized(tiny_models.bert(), directory, "dense", config=config, verify=False)


def test_observers_say_which_options_they_have() -> None:
    with pytest.raises(ConfigError, match=r"got {'foo': 1}; allowed with 'percentile': percentile"):
        ptq(scheme="int8_static", inputs={"observer": "percentile", "observer_options": {"foo": 1}})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("weights", "low"), "junk", "low: allowed: a list of finite numbers"),
        (("inputs", "low"), [5.0], "a range from"),
        (("inputs", "num_bits"), 4, "allowed: ints from -8 to 7"),
        (("weights", "method"), ["qat"], "method: got"),
        (("weights", "method"), "qta", "closest match: 'qat'"),
    ],
)
def test_descriptions_that_contradict_themselves(place, value, message) -> None:
    model = tiny_models.bert()
    result = calibrate(model, [dict(make_example_inputs(model))], ptq(scheme="int8_static"))
    found = json.loads(json.dumps(calibration_config(model)))
    result.detach()
    layer = next(iter(found["layers"].values()))
    layer[place[0]][place[1]] = value
    with pytest.raises(ConfigError, match=message):
        apply_calibration_config(model, found)


@pytest.mark.parametrize("targets", [["linear"], ["attention"], ["probabilities"]])
def test_padding_is_in_no_range(targets) -> None:
    model = tiny_models.bert()
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    longer = torch.cat([ids, torch.full((4, 6), 5)], 1)
    batches = {
        "short": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "padded": {"input_ids": longer, "attention_mask": (torch.arange(12) < 6).long().expand(4, 12)},
    }
    found = {}
    for name, batch in batches.items():
        result = calibrate(model, [batch], ptq(scheme="int8_static", targets=targets))
        found[name] = calibration_config(model)["layers"]
        result.detach()
    assert found["short"].keys() == found["padded"].keys()
    for name, layer in found["short"].items():
        assert layer["inputs"]["scale"] == pytest.approx(found["padded"][name]["inputs"]["scale"], rel=1e-4), name


def test_gptq_needs_linear_layers() -> None:
    model = tiny_models.bert()
    config = ptq(scheme="int8_weight_only", targets=["embedding"], options={"rounding": "gptq"})
    with pytest.raises(TargetError, match="no linear layer has a quantized weight"):
        calibrate(model, [dict(make_example_inputs(model))], config)


def test_what_has_no_weights_keeps_its_bits() -> None:
    model = tiny_models.bert()
    batch = {**make_example_inputs(model), "labels": torch.tensor([0, 1])}
    both = quantization_sensitivity(model, [batch], (8, 2), ptq(scheme="int8_static", targets=["linear", "attention"]))
    rules = both.rules(mean_bits=2)
    (found,) = (rule for rule in rules if any("keys" in each for each in rule.match))
    assert found.inputs == {"num_bits": 8}
    alone = quantization_sensitivity(model, [batch], (8, 2), ptq(scheme="int8_static", targets=["attention"]))
    with pytest.raises(ConfigError, match="no layer has a quantized weight"):
        alone.rules(mean_bits=8)
