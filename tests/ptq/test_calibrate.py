"""Calibrated models compute what independent references say, and what cannot be done leaves the model as it was."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from oneshot_models import Snapshot, batches, for_language, logit_error, trained
from quantized_models import on_int8_grid
from torch import Tensor, nn

from hf_compress import (
    ConfigError,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    TargetError,
    calibrate,
    calibration_config,
    dimension_groups,
    export_quantized,
    make_example_inputs,
    shrink,
)
from hf_compress.graph.capture import main_outputs
from hf_compress.instruments.attach import attach
from hf_compress.ptq import weights

QUERY = "bert.encoder.layer.1.attention.self.query"


def data_for(kind: str, count: int) -> list[Any]:
    return batches(count) if kind == "bert" else for_language(batches(count))


def ptq(**settings: Any) -> QuantizationConfig:
    return QuantizationConfig(method="ptq", **settings)


def inputs_of(model: Any, name: str, data: Any, *, padding: bool = False) -> Tensor:
    """Inputs of a layer at all tokens, [tokens, inputs]."""
    found = []

    def see(module: nn.Module, args: Any) -> None:
        x = args[0]
        found.append(x.flatten(0, -2) if padding else x[batch["attention_mask"].bool()])

    handle = model.get_submodule(name).register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    handle.remove()
    return torch.cat(found)


def test_ranges_are_those_of_torchs_observer_without_padding() -> None:
    from torch.ao.quantization import MinMaxObserver

    data = batches(4)
    dense, model = trained("bert"), trained("bert").train()
    for batch in data:  # what is padding must not matter
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    calibrate(model, data, ptq(scheme="int8_static"))
    assert model.training
    found = calibration_config(model)["layers"]
    assert len(found) == 13
    for name in found:
        reference = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine, eps=torch.finfo().eps)
        reference(inputs_of(dense, name, data, padding="pooler" in name))  # it sees the first token of each text
        scale, zero_point = reference.calculate_qparams()
        stored = found[name]["inputs"]
        assert torch.equal(torch.tensor(stored["scale"]), scale) and stored["zero_point"] == zero_point.tolist()
        assert (stored["low"], stored["high"]) == ([float(reference.min_val)], [float(reference.max_val)])


def test_outputs_have_ranges_too() -> None:
    data, dense, model = batches(2), trained("bert"), trained("bert")
    calibrate(model, data, ptq(weights=False, inputs=False, outputs={"symmetric": False}))
    layer = dense.get_submodule(QUERY)
    with torch.no_grad():
        y = layer(inputs_of(dense, QUERY, data))
        entry = calibration_config(model)["layers"][QUERY]
        assert entry.keys() == {"digest", "outputs"}
        stored = entry["outputs"]
        assert stored["low"] == pytest.approx([float(y.min())]) and stored["high"] == pytest.approx([float(y.max())])
        x = torch.randn(4, 32) * 3
        scale, zero_point = stored["scale"][0], stored["zero_point"][0]
        expected = torch.fake_quantize_per_tensor_affine(layer(x), scale, zero_point, -128, 127)
        assert torch.allclose(model.get_submodule(QUERY)(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_does_not_count_in_encoders_and_all_positions_do_in_decoders(kind: str) -> None:
    model = getattr(tiny_models, kind)().eval()
    data = [make_example_inputs(model, seed=seed) for seed in range(2)]
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 3:] = 0
        batch["input_ids"][0, 3:] = 7
    dense = copy.deepcopy(model)
    calibrate(model, data, ptq(scheme="int8_static"))
    layers = calibration_config(model)["layers"]
    differ = 0
    for name in layers:
        every = inputs_of(dense, name, data, padding=True)
        x = inputs_of(dense, name, data) if name.startswith(("encoder.", "model.encoder.")) else every
        stored = layers[name]["inputs"]
        assert (stored["low"], stored["high"]) == ([float(x.min())], [float(x.max())])
        differ += not torch.equal(x.amax(), every.amax())
    assert differ > 0


def test_a_layer_computes_with_torchs_own_fake_quantization() -> None:
    data = batches(2)
    dense, model = trained("bert"), trained("bert")
    calibrate(model, data, ptq(scheme="int8_static"))
    stored = calibration_config(model)["layers"][QUERY]
    layer, x = dense.get_submodule(QUERY), torch.randn(5, 32)
    quantized_x = torch.fake_quantize_per_tensor_affine(
        x, stored["inputs"]["scale"][0], stored["inputs"]["zero_point"][0], -128, 127
    )
    scale = layer.weight.detach().abs().amax(1) / 127.5
    assert torch.equal(torch.tensor(stored["weights"]["scale"]), scale)
    weight = torch.fake_quantize_per_channel_affine(
        layer.weight, scale, torch.zeros(32, dtype=torch.int32), 0, -128, 127
    )
    with torch.no_grad():
        expected = F.linear(quantized_x, weight, layer.bias)
        assert torch.allclose(model.get_submodule(QUERY)(x), expected, atol=1e-5)
        assert not torch.allclose(dense.get_submodule(QUERY)(x), expected, atol=1e-5)


@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
def test_other_observers_choose_narrower_ranges(observer: str) -> None:
    data = batches(4)
    options = {"percentile": 95.0} if observer == "percentile" else {}
    model = trained("bert")
    inputs = {"observer": observer, "observer_options": options, "num_bits": 4, "symmetric": True}
    calibrate(model, data, ptq(scheme="int8_static", inputs=inputs))
    x = inputs_of(trained("bert"), QUERY, data)
    stored = calibration_config(model)["layers"][QUERY]["inputs"]
    high = stored["high"][0]
    assert 0 < high <= float(x.abs().max())
    assert stored["scale"][0] == pytest.approx(high / 7.5)
    if observer == "percentile":  # of magnitudes, up to the width of a bin
        assert high == pytest.approx(float(x.abs().flatten().quantile(0.95)), rel=0.02)
    if observer == "mse":
        ends = [high, float(x.abs().max())]
        errors = [float((x - (x / (e / 7.5)).round().clamp(-8, 7) * (e / 7.5)).square().mean()) for e in ends]
        assert errors[0] < errors[1] and high < ends[1]


def test_without_observed_ranges_no_data_are_needed() -> None:
    dense, model = trained("bert"), trained("bert")
    result = calibrate(model, None, ptq(scheme="int8_dynamic"))
    linears = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert set(result.layers) == linears - {"classifier"}
    layer, x = dense.get_submodule(QUERY), torch.randn(5, 32)
    expected = F.linear(on_int8_grid(x), on_int8_grid(layer.weight), layer.bias)
    assert torch.allclose(model.get_submodule(QUERY)(x), expected, atol=1e-6)
    result.detach()
    assert logit_error(model, dense, batches(1)) == 0
    assert "13 layers" in result.summary() and result.changed == ()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gptq_makes_smaller_errors_and_exports_its_grid(kind: str, tmp_path) -> None:
    data, dense = data_for(kind, 8), trained(kind)
    settings = {"scheme": "int4_weight_only", "weights": {"num_bits": 3, "group_size": 16}}
    models = {name: trained(kind) for name in ("nearest", "gptq")}
    results = {n: calibrate(m, data, ptq(**settings, options={"rounding": n})) for n, m in models.items()}
    names = results["gptq"].layers
    assert results["gptq"].changed == tuple(f"{name}.weight" for name in names)
    first = names[0]  # read by nothing that was rounded before
    x = inputs_of(dense, first, data)
    wanted = F.linear(x, dense.get_submodule(first).weight)
    errors = {}
    for n, model in models.items():
        layer = model.get_submodule(first)
        bias = 0 if layer.bias is None else layer.bias
        errors[n] = (layer(x) - bias - wanted).square().sum().item()
    assert errors["gptq"] < 0.8 * errors["nearest"]
    total = {n: logit_error(m, dense, data) for n, m in models.items()}
    assert total["gptq"] < 0.8 * total["nearest"]

    stored = calibration_config(models["gptq"])["layers"][first]["weights"]
    weight = models["gptq"].get_submodule(first).weight.detach()
    integers = weight.view(-1, 16) / torch.tensor(stored["scale"])[:, None]
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert integers.round().min() >= -4 and integers.round().max() <= 3

    export_quantized(models["gptq"], tmp_path / "out", format="dense")
    loaded = type(dense).from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_submodule(first).weight, weight)
    assert logit_error(loaded, models["gptq"], data) == 0


def test_gptq_rounds_later_layers_on_what_rounded_ones_give(monkeypatch) -> None:
    """The second moments that a layer is rounded with are those of the half-rounded model."""
    data, model = batches(2), trained("bert")
    seen: list[Tensor] = []
    original = weights.inverse_hessian
    monkeypatch.setattr(weights, "inverse_hessian", lambda gram, d: seen.append(gram.clone()) or original(gram, d))
    calibrate(model, data, ptq(scheme="int4_weight_only", weights={"num_bits": 2}, options={"rounding": "gptq"}))
    last = "bert.pooler.dense"
    x = inputs_of_first_token(model, last, data)
    assert torch.allclose(seen[-1], x.T @ x, rtol=1e-4, atol=1e-3)
    dense = inputs_of_first_token(trained("bert"), last, data)
    assert not torch.allclose(seen[-1], dense.T @ dense, rtol=1e-2, atol=1e-2)


def inputs_of_first_token(model: Any, name: str, data: Any) -> Tensor:
    return inputs_of(model, name, data, padding=True).double()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_changes_weights_but_not_the_function(name: str, dtype: torch.dtype) -> None:
    model = getattr(tiny_models, name)().to(dtype).eval()
    data = [make_example_inputs(model, seed=seed) for seed in range(2)]
    with torch.no_grad():
        before = [main_outputs(model(**batch))[0].float() for batch in data]
    result = calibrate(model, data, ptq(scheme="int8_static", options={"smooth": 0.5}))
    assert any("norm" in each or "ln_" in each for each in result.changed)
    with torch.no_grad():
        quantized = [main_outputs(model(**batch))[0].float() for batch in data]
        result.detach()
        after = [main_outputs(model(**batch))[0].float() for batch in data]
    for one, other, rounded in zip(before, after, quantized, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(one, other)  # factors are powers of two
        assert tiny_models.relative_error(one, other) < 1e-5
        assert 1e-4 < tiny_models.relative_error(one, rounded) < 0.5


def test_smoothing_uses_the_papers_factors_and_shares_outliers() -> None:
    data, dense, model = data_for("llama", 4), trained("llama"), trained("llama")
    for each in (dense, model):  # an outlier channel of the inputs
        norm = each.model.layers[0].input_layernorm
        with torch.no_grad():
            norm.weight[3] *= 50
            for part in ("q_proj", "k_proj", "v_proj"):
                getattr(each.model.layers[0].self_attn, part).weight[:, 3] /= 50
    names = [f"model.layers.0.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    x = inputs_of(dense, names[0], data)
    columns = torch.cat([dense.get_submodule(name).weight.detach() for name in names]).abs().amax(0)
    factors = (x.abs().amax(0) ** 0.6) / columns**0.4
    result = calibrate(model, data, ptq(scheme="int8_static", options={"smooth": 0.6}))
    norm = model.model.layers[0].input_layernorm
    assert torch.allclose(norm.weight, dense.model.layers[0].input_layernorm.weight / factors, rtol=1e-5)
    for name in names:
        assert torch.allclose(model.get_submodule(name).weight, dense.get_submodule(name).weight * factors, rtol=1e-5)
    plain = copy.deepcopy(dense)
    calibrate(plain, data, ptq(scheme="int8_static"))
    assert logit_error(model, dense, data) < 0.5 * logit_error(plain, dense, data)
    assert any("o_proj" in note and "down_proj" in note for note in result.notes)


@pytest.mark.parametrize("name", ["t5", "opt", "llama"])
def test_equalization_makes_ranges_even_and_keeps_the_function(name: str) -> None:
    first, second = {
        "t5": ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo"),
        "opt": ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
        "llama": ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    }[name]
    model = getattr(tiny_models, name)().eval()
    inputs = make_example_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
    result = calibrate(model, None, ptq(scheme="int8_weight_only", options={"equalize": True}))
    assert f"{first}.weight" in result.changed and f"{second}.weight" in result.changed
    rows = model.get_submodule(first).weight.detach().abs().amax(1)
    assert torch.allclose(rows, model.get_submodule(second).weight.detach().abs().amax(0), rtol=1e-5)
    result.detach()
    with torch.no_grad():
        assert tiny_models.relative_error(before, model(**inputs).logits) < 1e-5


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_bias_correction_takes_the_mean_error_out(rounding: str) -> None:
    data, dense = batches(4), trained("bert")
    settings = {"scheme": "int8_weight_only", "weights": {"num_bits": 3}}
    name = "bert.encoder.layer.0.intermediate.dense"
    x = inputs_of(dense, name, data)
    means = {}
    for corrected in (False, True):
        model = trained("bert")
        options = {"rounding": rounding, "bias_correction": corrected}
        result = calibrate(model, data, ptq(**settings, options=options))
        assert (f"{name}.bias" in result.changed) == corrected
        with torch.no_grad():
            means[corrected] = (model.get_submodule(name)(x) - dense.get_submodule(name)(x)).mean(0)
    assert float(means[True].abs().max()) < 1e-5
    assert float(means[False].abs().max()) > 1e-2


def broken_loader() -> Iterator[Any]:
    yield from batches(1)
    raise OSError("the disk is gone")


STATIC = {"scheme": "int8_static"}


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (None, STATIC, ConfigError, "needs data, for ranges of inputs"),
        (None, {"options": {"bias_correction": True}}, ConfigError, "needs data, for bias_correction"),
        ([], STATIC, ConfigError, "calibrate: the dataloader gave no batch"),
        ([[1, 2]], STATIC, ConfigError, "calibrate: batch 0 of the dataloader is a list"),
        ([{"input_ids": torch.full((1, 4), 999)}], STATIC, TargetError, "calibrate: .*forward failed on batch 0"),
        (batches(1), {**STATIC, "options": {"smooth": 0.5}}, TargetError, "smooth: no norm of Bert"),
        (batches(1), {**STATIC, "options": {"equalize": True}}, TargetError, "equalize: Bert.* has no two"),
        (batches(1), {**STATIC, "targets": ["convolution"]}, TargetError, "has no Conv1d"),
    ],
)
def test_what_cannot_be_done_is_said(data: Any, settings: Any, error: type[Exception], message: str) -> None:
    model = trained("bert").train()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        calibrate(model, data, ptq(**settings))
    before.check()


@pytest.mark.parametrize("fails", ["loader", "gptq", "numbers"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(fails: str, monkeypatch) -> None:
    model, data = trained("llama").train(), data_for("llama", 2)
    before = Snapshot(model)
    options = {"rounding": "gptq", "smooth": 0.5, "equalize": True}
    if fails == "gptq":
        turns = iter(range(4))
        original = weights.gptq

        def gptq(*args: Any, **keywords: Any) -> Any:
            if next(turns) == 3:
                raise KeyboardInterrupt
            return original(*args, **keywords)

        monkeypatch.setattr(weights, "gptq", gptq)
    if fails == "numbers":
        monkeypatch.setattr(weights, "equalizing_factors", lambda first, second: torch.full((len(first),), -1.0))
    expected = {"loader": OSError, "gptq": KeyboardInterrupt, "numbers": TargetError}[fails]
    message = {"loader": "disk", "gptq": None, "numbers": "smoothing or equalizing changed the outputs"}[fails]
    if fails == "numbers":  # ReLU does not let negative factors through
        model = tiny_models.opt()
        before, data = Snapshot(model), [make_example_inputs(model)]
    with pytest.raises(expected, match=message):
        calibrate(model, broken_loader() if fails == "loader" else data, ptq(**STATIC, options=options))
    before.check()


def test_layers_that_no_data_reach_are_named() -> None:
    model = trained("bert")
    before = Snapshot(model)
    skipped = model.bert.encoder.layer[1].attention.self
    skipped.forward = lambda x, *args, **kwargs: (x, None)
    message = rf"3 layers are never called .*: '{QUERY}', .*key', .*value'\. Exclude them"
    with pytest.raises(TargetError, match=message):
        calibrate(model, batches(1), ptq(**STATIC))
    del skipped.forward
    before.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"rounding": "best"}}, "unknown value 'best'"),
        ({"options": {"damping": 0.1}}, "damping: got 0.1"),
        ({"options": {"smooth": 2}}, "smooth: got 2"),
        ({"options": {"equalize": 1}}, "equalize: got 1"),
        ({"scheme": "int8_weight_only", "options": {"smooth": 0.5}}, "None unless weights and inputs are quantized"),
        ({"weights": {"granularity": "tensor"}, "options": {"rounding": "gptq"}}, "'channel' or 'group'"),
        ({"weights": False, "options": {"bias_correction": True}}, "False without weights"),
        ({"inputs": {"dynamic": False, "granularity": "tensor", "observer": "ema"}}, "no moving average"),
    ],
)
def test_settings_that_do_not_go_together(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ptq(**settings)


def test_other_arguments_that_are_wrong() -> None:
    model = trained("bert")
    with pytest.raises(ConfigError, match="method is 'qat'; allowed: 'ptq'"):
        calibrate(model, batches(1), QuantizationConfig())
    with pytest.raises(ConfigError, match="pass a QuantizationConfig"):
        calibrate(model, batches(1), PruningConfig(structures={"heads": 0.5}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_batches=2, but this config needs no data"):
        calibrate(model, batches(1), ptq(), num_batches=2)
    result = calibrate(model, batches(1), ptq())
    with pytest.raises(TargetError, match=r"left by calibrate or an earlier training run\. Call detach"):
        calibrate(model, batches(1), ptq())
    result.detach()
    calibrate(model, batches(1), ptq())


def test_no_bias_to_correct() -> None:
    with pytest.raises(TargetError, match="no quantized linear layer has a bias"):
        calibrate(trained("llama"), data_for("llama", 1), ptq(options={"bias_correction": True}))


def test_gates_come_first() -> None:
    model = trained("bert")
    attach(QUERY, model.get_submodule(QUERY)).input_gates.append(lambda: torch.ones(32))
    with pytest.raises(TargetError, match=rf"are attached to '{QUERY}'. Call shrink\(\) first"):
        calibrate(model, None, ptq())


def test_shrunk_models_are_calibrated(tiny_bert, classification_data, make_trainer) -> None:
    callback = PruningCallback(PruningConfig(structures={"ffn": 0.5}))
    trainer = make_trainer(tiny_bert(), classification_data(16), [callback], max_steps=4)
    trainer.train()
    small = shrink(trainer)
    data = [make_example_inputs(small)]
    assert len(calibrate(small, data, ptq(**STATIC, options={"rounding": "gptq"})).layers) == 13


def test_training_takes_the_quantizers_off(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    calibrate(model, None, ptq(scheme="int4_weight_only", weights={"group_size": 4}))
    trainer = make_trainer(model, classification_data(16), [QuantizationCallback(QuantizationConfig())], max_steps=2)
    with pytest.warns(UserWarning, match="quantizers"):
        trainer.train()
    methods = {each["weights"]["method"] for each in calibration_config(model)["layers"].values()}
    assert methods == {"qat"}


def test_convolutions_are_quantized_and_said_to_be_rounded_to_nearest() -> None:
    model = tiny_models.vit().eval()
    data = [make_example_inputs(model)]
    settings = {"targets": ["linear", "convolution"], "weights": {"num_bits": 4}, "scheme": "int8_static"}
    result = calibrate(model, data, ptq(**settings, options={"rounding": "gptq"}))
    (convolution,) = (name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert (
        convolution in result.layers
        and "gptq: 1 weights that are not of linear layers are rounded to nearest" in result.notes
    )
    stored = calibration_config(model)["layers"][convolution]["weights"]
    expected = model.get_submodule(convolution).weight.detach().flatten(1).abs().amax(1) / 7.5
    assert torch.allclose(torch.tensor(stored["scale"]), expected)


def test_shrinking_gives_a_floating_point_model_if_asked() -> None:
    model, data = trained("bert"), batches(1)
    masks = {
        group.name: torch.arange(group.num_units) >= 16 for group in dimension_groups(model) if group.kind == "ffn"
    }
    calibrate(model, data, ptq(**STATIC))
    small = shrink(model, masks, quantizers=False)
    assert logit_error(small, shrink(trained("bert"), masks), data) == 0
    with pytest.raises(TargetError, match="no quantizers"):
        calibration_config(small)
    assert len(calibration_config(model)["layers"]) == 13
