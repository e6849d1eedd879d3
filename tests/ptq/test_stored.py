"""A calibration that is stored and put on a fresh model gives bit-identical outputs; wrong ones are refused."""

import copy
import functools
import json
from typing import Any

import pytest
import tiny_models
import torch
from oneshot_models import Snapshot, batches, trained

from hf_compress import (
    ConfigError,
    ExportError,
    QuantizationCallback,
    QuantizationConfig,
    TargetError,
    apply_calibration_config,
    calibrate,
    calibration_config,
    export_quantized,
    make_example_inputs,
)
from hf_compress.graph.capture import main_outputs
from hf_compress.instruments.fake_quantize import remove_fake_quantizers
from hf_compress.instruments.quantize import attached_quantizers

QUERY = "bert.encoder.layer.1.attention.self.query"


def outputs(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return main_outputs(model.eval()(**inputs))[0]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "int8_static", "outputs": {"observer": "percentile"}},
        {"scheme": "int8_dynamic", "weights": {"symmetric": False, "num_bits": 5}},
        {"scheme": "int4_weight_only", "weights": {"group_size": 4}, "options": {"rounding": "gptq"}},
    ],
    ids=["static", "dynamic", "gptq"],
)
def test_applied_to_a_fresh_model_the_outputs_are_bit_identical(name: str, settings: Any, tmp_path) -> None:
    model = getattr(tiny_models, name)().eval()
    fresh = copy.deepcopy(model)
    inputs = make_example_inputs(model)
    calibrate(model, [inputs], QuantizationConfig(method="ptq", **settings))
    with (tmp_path / "calibration.json").open("w") as file:
        json.dump(calibration_config(model), file, allow_nan=False)
    plain = outputs(fresh, inputs)
    if "options" in settings:
        with pytest.raises(TargetError, match="is not the one that was calibrated"):
            apply_calibration_config(fresh, tmp_path / "calibration.json")
        assert torch.equal(outputs(fresh, inputs), plain)
        model.save_pretrained(tmp_path / "saved")
        fresh = type(model).from_pretrained(tmp_path / "saved")
    result = apply_calibration_config(fresh, tmp_path / "calibration.json")
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    assert not torch.equal(outputs(fresh, inputs), plain)
    assert calibration_config(fresh) == calibration_config(model)
    result.detach()
    with pytest.raises(TargetError, match="no quantizers"):
        calibration_config(fresh)


def test_the_description_says_all_of_a_tensor() -> None:
    model = trained("bert")
    config = QuantizationConfig(method="ptq", scheme="int8_static", weights={"granularity": "group", "group_size": 16})
    calibrate(model, batches(2), config)
    stored = calibration_config(model)
    weight = model.get_submodule(QUERY).weight.detach()
    groups = weight.view(64, 16)
    entry = stored["layers"][QUERY]["weights"]
    expected = groups.abs().amax(1) / 127.5
    assert entry["scale"] == expected.tolist() and entry["zero_point"] is None
    assert entry["low"] == groups.amin(1).tolist() and entry["high"] == groups.amax(1).tolist()
    wanted = {"num_bits": 8, "granularity": "group", "group_size": 16, "symmetric": True, "signed": True}
    assert {key: entry[key] for key in wanted} == wanted and entry["method"] == "ptq"
    inputs = stored["layers"][QUERY]["inputs"]
    low, high = inputs["low"][0], inputs["high"][0]
    assert inputs["scale"][0] == pytest.approx((high - low) / 255)
    assert inputs["zero_point"] == [round(-128 - low / inputs["scale"][0])]


def test_trained_steps_are_described_too(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    callback = QuantizationCallback(QuantizationConfig(scheme="int8_static", method="qat"))
    make_trainer(model, classification_data(16), [callback], max_steps=3).train()
    stored = calibration_config(model)
    assert {each["inputs"]["method"] for each in stored["layers"].values()} == {"qat"}
    fresh = copy.deepcopy(model)
    callback.detach()
    inputs = make_example_inputs(model)
    expected = outputs(fresh, inputs)
    apply_calibration_config(model, stored)
    assert torch.equal(outputs(model, inputs), expected)


def test_other_weights_can_be_meant() -> None:
    model, other = trained("bert"), trained("bert")
    calibrate(model, batches(1), QuantizationConfig(method="ptq", scheme="int8_static"))
    with torch.no_grad():
        other.get_submodule(QUERY).weight.mul_(2)
    stored = calibration_config(model)
    with pytest.raises(TargetError, match=f"the weight or bias of '{QUERY}' is not the one"):
        apply_calibration_config(other, stored)
    apply_calibration_config(other, stored, other_weights=True)
    found = calibration_config(other)["layers"][QUERY]
    assert found["weights"]["scale"] == stored["layers"][QUERY]["weights"]["scale"]  # as described, not as computed


def _set(*path: str, value: Any) -> Any:
    def change(stored: Any) -> None:
        inner = stored
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def _drop(*path: str) -> Any:
    def change(stored: Any) -> None:
        inner = stored
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


@functools.cache
def calibrated() -> str:
    model = trained("bert")
    calibrate(model, batches(1), QuantizationConfig(method="ptq", scheme="int8_static"))
    return json.dumps(calibration_config(model))


WEIGHTS, INPUTS = ("layers", QUERY, "weights"), ("layers", QUERY, "inputs")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_set("layers", "bert.nothing", value={}), ConfigError, "missing 'digest'"),
        (_set("version", value=2), ConfigError, "version 2"),
        (_set("more", value=2), ConfigError, "unknown key 'more'"),
        (_drop("version"), ConfigError, "missing 'version'"),
        (_set("layers", value=[]), ConfigError, "layers: got list"),
        (_set("layers", value={}), ConfigError, "has no layer"),
        (_set("layers", QUERY, "weight", value={}), ConfigError, "unknown key 'weight'; closest match: 'weights'"),
        (_drop(*WEIGHTS, "scale"), ConfigError, "missing 'scale'"),
        (_set(*WEIGHTS, "bits", value=8), ConfigError, "unknown key 'bits'"),
        (_set(*WEIGHTS, "num_bits", value=9), ConfigError, "num_bits: got 9"),
        (_set(*WEIGHTS, "granularity", value="token"), ConfigError, "weights.granularity"),
        (_set(*WEIGHTS, "method", value="magic"), ConfigError, "magic"),
        (_set(*WEIGHTS, "signed", value=False), ConfigError, "signed: got False"),
        (_set(*WEIGHTS, "scale", value=[1.0] * 31), TargetError, "got 31 numbers, but the tensor has 32"),
        (_set(*WEIGHTS, "scale", value=[-1.0] + [1.0] * 31), ConfigError, "a number <= 0"),
        (_set(*WEIGHTS, "scale", value=[float("nan")] * 32), ConfigError, "finite numbers"),
        (_set(*WEIGHTS, "scale", value=["1"] * 32), ConfigError, "finite numbers"),
        (_set(*WEIGHTS, "scale", value=None), ConfigError, "finite numbers"),
        (_set(*WEIGHTS, "zero_point", value=[0] * 32), ConfigError, "None if and only if symmetric"),
        (_set(*INPUTS, "zero_point", value=None), ConfigError, "None if and only if symmetric"),
        (_set(*INPUTS, "zero_point", value=[200]), ConfigError, "ints from -128 to 127"),
        (_set(*INPUTS, "zero_point", value=[0.5]), ConfigError, "ints from -128 to 127"),
        (_set(*INPUTS, "low", value=[float("-inf")]), ConfigError, "finite numbers"),
        (_set(*INPUTS, "dynamic", value=True), ConfigError, "None with dynamic=True"),
    ],
)
def test_wrong_descriptions_are_refused(change: Any, error: type[Exception], message: str) -> None:
    stored, fresh = json.loads(calibrated()), trained("bert")
    change(stored)
    before = Snapshot(fresh)
    with pytest.raises(error, match=message):
        apply_calibration_config(fresh, stored)
    before.check()


def test_unknown_layers_and_files(tmp_path) -> None:
    model = trained("bert")
    calibrate(model, batches(1), QuantizationConfig(method="ptq", scheme="int8_static"))
    stored = calibration_config(model)
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no 'bert\.encoder"):
        apply_calibration_config(trained("llama"), stored)
    with pytest.raises(TargetError, match="has a fake quantizer already"):
        apply_calibration_config(model, stored)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken.json cannot be read as JSON"):
        apply_calibration_config(trained("bert"), tmp_path / "broken.json")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        apply_calibration_config(trained("bert"), str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {"scheme": "int8_weight_only", "targets": ["linear", "embedding"]}),
        ("bert", {"scheme": "int8_static", "targets": ["linear", "attention"]}),
        ("mixtral", {"scheme": "int8_weight_only", "targets": ["linear", "experts"]}),
    ],
)
def test_every_kind_of_layer_goes_there_and_back(name, settings) -> None:
    model = trained(name) if name == "bert" else getattr(tiny_models, name)().eval()
    inputs = make_example_inputs(model)
    fresh = copy.deepcopy(model)
    calibrate(model, [inputs] if settings["scheme"] == "int8_static" else None, ptq_config(settings))
    stored = json.loads(json.dumps(calibration_config(model)))
    apply_calibration_config(fresh, stored)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    assert not torch.equal(outputs(fresh, inputs), outputs(_plain(fresh), inputs))


def ptq_config(settings: dict[str, Any]) -> QuantizationConfig:
    return QuantizationConfig(method="ptq", **settings)


def _plain(model: Any) -> Any:
    duplicate = copy.deepcopy(model)
    remove_fake_quantizers(duplicate)
    return duplicate


def test_tied_tables_share_one_quantizer_again() -> None:
    model = tiny_models.gpt2().eval()
    fresh = copy.deepcopy(model)
    calibrate(
        model, None, ptq_config({"scheme": "int8_weight_only", "targets": ["linear", "embedding"], "exclude": ()})
    )
    apply_calibration_config(fresh, calibration_config(model))
    by_name = {layer.name: layer.weights for layer in attached_quantizers(fresh).layers}
    assert by_name["lm_head"] is by_name["transformer.wte"]


def test_numbers_that_are_too_large_are_refused() -> None:
    model = trained("bert")
    fresh = copy.deepcopy(model)
    calibrate(model, None, ptq_config({"scheme": "int8_weight_only"}))
    stored = calibration_config(model)
    stored["layers"][QUERY]["weights"]["scale"][0] = 1e300
    with pytest.raises(ConfigError, match="scale: got a number that float32 does not hold"):
        apply_calibration_config(fresh, stored)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = trained("bert")
    with torch.no_grad():
        model.get_submodule(QUERY).weight[0, 0] = torch.nan
    with pytest.raises(TargetError, match=r"query\.weight' has entries that are not finite"):
        calibrate(model, None, ptq_config({}))
    with pytest.raises(ExportError, match=r"query\.weight' has entries that are not finite"):
        export_quantized(model, "never")
