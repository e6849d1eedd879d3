"""Embeddings, experts and attention on a grid, against the numbers computed by hand."""

import copy
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from quantized_models import on_int8_grid
from torch import nn
from transformers import PreTrainedModel
from zoo import ZOO

from hf_compress import QuantizationConfig, dimension_groups, make_example_inputs
from hf_compress.errors import ConfigError, TargetError
from hf_compress.instruments.fake_quantize import quantizable_layers, remove_fake_quantizers
from hf_compress.instruments.gate import gated
from hf_compress.instruments.quantize import Quantized, attached_quantizers, make_quantizers
from hf_compress.instruments.targets import target_of
from hf_compress.quantization.quantizers import LearnedQuantizer

eager_mixtral = partial(tiny_models.mixtral, experts_implementation="eager")


def install(model: PreTrainedModel, *targets: str, exclude: Any = None, **config: Any) -> Quantized:
    settings = QuantizationConfig(targets=targets, exclude=exclude, **config)
    quantized = make_quantizers(settings, quantizable_layers(model, exclude, targets))
    quantized.install()
    return quantized


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_example_inputs(model)).logits


def replaced(model: PreTrainedModel, *names: str, transposed: bool = False) -> torch.Tensor:
    """Outputs of a copy whose parameters are rounded row by row, along their inputs."""
    duplicate = copy.deepcopy(model)
    for name in names:
        parameter = duplicate.get_parameter(name)
        rows = parameter.transpose(-1, -2) if transposed else parameter
        rounded = on_int8_grid(rows.reshape(-1, rows.shape[-1])).view(rows.shape)
        parameter.data.copy_(rounded.transpose(-1, -2) if transposed else rounded)
    return outputs(duplicate)


def test_rows_of_embeddings_are_rounded_one_by_one() -> None:
    model = tiny_models.bert()
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    expected = replaced(model, *(f"{name}.weight" for name in tables))
    quantized = install(model, "embedding")
    assert [layer.name for layer in quantized.layers] == tables
    assert torch.equal(outputs(model), expected)
    assert list(model.state_dict()) == list(tiny_models.bert().state_dict())
    remove_fake_quantizers(model)
    assert torch.equal(outputs(model), outputs(tiny_models.bert()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_output_of_each_expert_has_its_step(name) -> None:
    model = {**ZOO, **_others()}[name]()
    transposed = name == "gpt_oss"
    weights = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert weights
    expected = replaced(model, *weights, transposed=transposed)
    quantized = install(model, "experts")
    assert [layer.name for layer in quantized.layers] == weights
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)


def _others() -> dict[str, Any]:
    from zoo import OTHERS, VARIANTS

    return {**OTHERS, **VARIANTS}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_queries_keys_and_values_are_rounded_per_token_and_head(implementation) -> None:
    model = tiny_models.llama(attn_implementation=implementation, num_hidden_layers=1)
    seen: dict[str, torch.Tensor] = {}
    attend = F.scaled_dot_product_attention
    quantized = install(model, "attention")
    assert [layer.name.rpartition(".")[2] for layer in quantized.layers] == ["queries", "keys", "values"]
    for layer in quantized.layers:
        part, on_grid = layer.name.rpartition(".")[2], layer.inputs.fake_quantize

        def watched(x, removed, prepared, part=part, on_grid=on_grid):
            seen[part] = x
            return on_grid(x, removed, prepared)

        layer.inputs.fake_quantize = watched
    results: dict[str, torch.Tensor] = {}
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: results.update(x=args[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 13).view(2, 5))
    q, k, v = (on_int8_grid(seen[part]) for part in ("queries", "keys", "values"))
    assert q.shape[1] == 2 * k.shape[1]
    expected = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
    torch.testing.assert_close(results["x"], expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_probabilities_are_rounded_row_by_row(name, implementation) -> None:
    """Against eager attention whose softmax is rounded; with padding, causal masks, grouped heads, position biases."""
    model = ZOO[name](attn_implementation="eager")
    inputs = make_example_inputs(model, seed=3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -2:] = 0
    softmax, rounded = F.softmax, []

    def on_grid(x, *args, **kwargs):
        found = softmax(x, *args, **kwargs)
        rounded.append(found)
        return on_int8_grid(found)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", on_grid)
        expected = model(**inputs).logits
    plain = model(**inputs).logits
    assert rounded and not torch.allclose(plain, expected, rtol=1e-6)
    model.set_attn_implementation(implementation)
    quantized = install(model, "probabilities")
    assert {layer.name.rpartition(".")[2] for layer in quantized.layers} == {"probabilities"}
    with torch.no_grad():
        found = model(**inputs).logits
    keep = inputs["attention_mask"].bool() if found.shape[:2] == inputs["attention_mask"].shape else slice(None)
    error = (found[keep] - expected[keep]).abs().max() / expected.abs().max()
    assert error < 0.1 * (plain[keep] - expected[keep]).abs().max() / expected.abs().max() or error < 1e-5


def test_rules_and_exclude_address_parts_of_attention() -> None:
    model = tiny_models.bert()
    config = {"rules": [{"match": ["keys$"], "inputs": {"num_bits": 4}}]}
    quantized = install(model, "attention", exclude=("values$",), **config)
    bits = {layer.name.rpartition(".")[2]: layer.inputs.num_bits for layer in quantized.layers}
    assert bits == {"queries": 8, "keys": 4}
    assert attached_quantizers(model).named().keys() == quantized.named().keys()


def test_a_tied_weight_has_one_quantizer_on_both_sides() -> None:
    model = tiny_models.gpt2()
    expected = replaced(model, "transformer.wte.weight")
    config = {"inputs": False, "rules": [{"match": ["c_", "wpe"], "weights": False}]}
    quantized = install(model, "linear", "embedding", exclude=(), **config)
    assert {layer.name for layer in quantized.layers} == {"transformer.wte", "lm_head"}
    assert len(quantized.named()) == len(quantized.weighted()) == 1
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(
    ("targets", "exclude", "rules", "message"),
    [
        (("embedding",), None, (), "is that of 'lm_head', too, which is left in floating point by exclude=None"),
        (("linear",), (), (), "weight of 'lm_head' is shared with another module"),
        (("linear", "embedding"), ("lm_head",), (), r"'lm_head', too, which is left in floating point"),
        (
            ("linear", "embedding"),
            (),
            [{"match": ["wte"], "weights": {"num_bits": 4}}],
            "'transformer.wte' and 'lm_head' have one weight, but rules give it two formats",
        ),
    ],
)
def test_a_tied_weight_with_one_side_in_floating_point_raises(targets, exclude, rules, message) -> None:
    with pytest.raises(TargetError, match=message):
        install(tiny_models.gpt2(), *targets, exclude=exclude, rules=rules)


@pytest.mark.parametrize(("setting", "value"), [("max_norm", 1.0), ("sparse", True)])
def test_tables_that_change_while_they_are_read_raise(setting, value) -> None:
    model = tiny_models.bert()
    setattr(model.bert.embeddings.word_embeddings, setting, value)
    with pytest.raises(TargetError, match=f"has {setting}={value}; allowed"):
        install(model, "embedding")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"targets": ["attention"], "inputs": False}, ConfigError, "targets: got 'attention'; .* inputs are not"),
        ({"targets": ["embedding"], "weights": False}, ConfigError, "targets: got 'embedding'; .* weights are not"),
    ],
)
def test_a_target_without_effect_raises(config, error, message) -> None:
    with pytest.raises(error, match=message):
        QuantizationConfig(**config)


def test_a_rule_without_effect_raises() -> None:
    with pytest.raises(TargetError, match="matches only layers that have no inputs to quantize"):
        install(tiny_models.bert(), "embedding", rules=[{"match": ["word"], "inputs": {"num_bits": 4}}])


@pytest.mark.parametrize("target", ["embedding", "experts", "attention", "probabilities"])
def test_a_model_without_a_target_raises(target) -> None:
    model = {"embedding": tiny_models.vit, "experts": tiny_models.bert, "attention": tiny_models.deberta_v2}
    model = model.get(target, tiny_models.deberta_v2)()
    with pytest.raises(TargetError, match=rf"has no .* \(target '{target}'\)"):
        quantizable_layers(model, None, (target,))


def test_groups_that_do_not_divide_a_row_raise() -> None:
    with pytest.raises(TargetError, match=r"word_embeddings.*32 inputs .* are no multiple of size=24"):
        install(tiny_models.bert(), "embedding", weights={"granularity": "group", "group_size": 24})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny_models.bert, eager_mixtral], ids=["bert", "mixtral"])
def test_gradients_pass_straight_through(make, checkpointing) -> None:
    """The gradient of a table or an expert is that of a model with the rounded numbers."""
    others = ("attention", "probabilities")
    targets = ("embedding", *others) if make is tiny_models.bert else ("embedding", "experts", *others)
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    install(model, *targets)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = make_example_inputs(model)
    labels = inputs["input_ids"] if model.can_generate() else torch.tensor([0, 1])
    model(**inputs, labels=labels).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    plain = make().train()
    names = [layer.name for layer in attached_quantizers(model).layers if layer.weights is not None]
    for name in names:
        parameter = plain.get_parameter(name if "experts" in name else f"{name}.weight")
        parameter.data.copy_(on_int8_grid(parameter.reshape(-1, parameter.shape[-1])).view(parameter.shape))
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    install(plain, *others)
    plain(**inputs, labels=labels).loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_bf16_models_compute_nearly_the_same() -> None:
    model = tiny_models.bert(num_hidden_layers=1)
    install(model, "linear", "embedding", "attention")
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_models.relative_error(outputs(model), outputs(tiny_models.bert(num_hidden_layers=1))) < 0.1
    assert outputs(model.to(torch.bfloat16)).isfinite().all()


@pytest.mark.slow
def test_compiled_models_compute_the_same() -> None:
    torch.compiler.reset()
    inputs = make_example_inputs(tiny_models.bert())
    model = tiny_models.bert(num_hidden_layers=1)
    install(model, "linear", "embedding", "attention")
    compiled = torch.compile(model, backend="aot_eager")
    assert tiny_models.relative_error(outputs(model), compiled(**inputs).logits.detach()) < 1e-2


def test_removed_channels_count_in_no_range() -> None:
    """A row of a producer, a column of a table, however large, once its unit is gated."""
    model = tiny_models.llama()
    groups = {g.name: g for g in dimension_groups(model) if g.kind in ("ffn", "hidden")}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 40.0
        model.model.embed_tokens.weight[:, 5] = 40.0
    per_tensor = {"weights": {"granularity": "tensor"}, "inputs": False}
    install(model, "linear", "embedding", **per_tensor)
    up = model.model.layers[0].mlp.up_proj
    ids = torch.arange(4).view(1, 4)
    with gated(model, groups, needs_gradient=False) as gates:
        for name, gate in gates.items():
            mask = torch.ones(groups[name].num_units, dtype=torch.bool)
            mask[3 if groups[name].kind == "ffn" else 5] = groups[name].kind == "ffn" and "0" not in name
            gate.set_mask(mask)
        table = model.model.embed_tokens(ids)
        x = torch.eye(up.in_features)
        rows = up(x).t()
    kept = [i for i in range(32) if i != 5]
    step = model.model.embed_tokens.weight[:, kept].abs().max() / 127.5
    steps = table[..., kept] / step
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert rows[0].abs().max() < 40 and len(rows[0].unique()) > 10


def test_learned_steps_of_a_table_get_gradients() -> None:
    model = tiny_models.bert().train()
    quantized = install(model, "embedding", method="lsq")
    for layer in quantized.weighted():
        assert isinstance(layer.weights, LearnedQuantizer)
        layer.weights.initialize(layer.module.weight.detach())
    inputs = make_example_inputs(model)
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    words = quantized.layers[0]
    grad = words.weights.learned["step"].grad
    read = torch.zeros(len(grad), dtype=torch.bool).index_fill(0, inputs["input_ids"].unique(), True)
    read[words.module.padding_idx] = False
    assert grad[read].abs().min() > 0 and grad[~read].abs().max() == 0


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.ConvTranspose1d(2, 2, 1), nn.Bilinear(2, 2, 2)])
def test_what_cannot_be_quantized_is_named_with_what_can(module) -> None:
    with pytest.raises(TargetError, match=f"cannot attach to {type(module).__name__}; allowed: Linear, Conv1D"):
        target_of("encoder.part", module)
