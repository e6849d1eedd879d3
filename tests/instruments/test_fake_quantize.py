import copy

import peft
import pytest
import tiny_models
import torch
import transformers
from quantized_models import fake_quantized_modules, install_quantizers, on_int8_grid
from torch import nn
from uneven_models import example_ids, logits

from hf_compress.errors import ConfigError, TargetError
from hf_compress.instruments.attach import attach, attachment_of
from hf_compress.instruments.fake_quantize import (
    quantizable_layers,
    remove_fake_quantizers,
)


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_by_default_the_task_head_stays_in_floating_point() -> None:
    model = tiny_models.bert()
    assert set(quantizable_layers(model)) == linear_names(model) - {"classifier"}


@pytest.mark.parametrize("make", [tiny_models.bert_mlm, tiny_models.llama, tiny_models.t5, tiny_models.bart], ids=str)
def test_by_default_output_and_tied_embeddings_stay_in_floating_point(make) -> None:
    model = make()
    chosen = quantizable_layers(model)
    output = model.get_output_embeddings()
    assert chosen
    assert all(module is not output for module in chosen.values())
    assert all(module.weight is not model.get_input_embeddings().weight for module in chosen.values())


def test_an_untied_output_inside_the_base_model_stays_in_floating_point() -> None:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.lm_head.weight = nn.Parameter(model.shared.weight.clone())
    assert model.base_model is model
    assert set(quantizable_layers(model)) == linear_names(model) - {"lm_head"}


def test_by_default_a_weight_shared_by_two_layers_stays_in_floating_point() -> None:
    model = tiny_models.bert()
    first, second = (layer.attention.self.query for layer in model.bert.encoder.layer)
    second.weight = first.weight
    chosen = quantizable_layers(model)
    assert not {first, second} & set(chosen.values())
    assert len(chosen) == 13 - 2


def test_a_base_model_alone_is_quantized_whole() -> None:
    model = tiny_models.bert().bert
    assert set(quantizable_layers(model)) == linear_names(model)


def test_patterns_leave_layers_out() -> None:
    model = tiny_models.bert()
    chosen = quantizable_layers(model, [r"attention\.self", r"^classifier$"])
    assert set(chosen) == {n for n in linear_names(model) if "attention.self" not in n and n != "classifier"}
    assert set(quantizable_layers(model, ())) == linear_names(model)


def test_a_linear_that_is_never_called_is_left_out() -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = transformers.SiglipVisionModel(config)
    in_head = {name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert in_head
    assert not {f"{name}.out_proj" for name in in_head} & set(quantizable_layers(model))


def test_a_pattern_without_match_raises_with_the_closest_name() -> None:
    with pytest.raises(TargetError, match=r"'clasifier' matches no layer.*closest match: 'classifier'"):
        quantizable_layers(tiny_models.bert(), ["clasifier"])


def test_a_broken_pattern_raises() -> None:
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        quantizable_layers(tiny_models.bert(), ["("])


def test_excluding_everything_raises() -> None:
    with pytest.raises(TargetError, match="none of the 14 layers"):
        quantizable_layers(tiny_models.bert(), ["."])


def test_asking_for_a_tied_weight_raises() -> None:
    with pytest.raises(TargetError, match=r"weight of 'cls\.predictions\.decoder' is shared"):
        quantizable_layers(tiny_models.bert_mlm(), ())


def test_a_model_without_layers_of_a_kind_raises() -> None:
    with pytest.raises(TargetError, match=r"BertForSequenceClassification has no Conv1d or Conv2d"):
        quantizable_layers(tiny_models.bert(), None, ("linear", "convolution"))


def test_conv1d_of_gpt2_is_quantized_with_a_step_for_each_output() -> None:
    model = tiny_models.gpt2()
    chosen = quantizable_layers(model)
    name, layer = next(iter(chosen.items()))
    assert name.endswith("c_attn")
    x = torch.randn(3, layer.nx)
    install_quantizers({name: layer}, inputs=False)
    assert torch.equal(layer(x), torch.addmm(layer.bias, x, on_int8_grid(layer.weight.t()).t()))


def test_a_lora_layer_stands_for_the_linear_that_merging_leaves() -> None:
    adapted = peft.get_peft_model(tiny_models.bert(), peft.LoraConfig(target_modules=["query"]))
    assert list(quantizable_layers(adapted.get_base_model())) == list(quantizable_layers(tiny_models.bert()))
    with pytest.raises(TargetError, match="allowed: a transformers PreTrainedModel"):
        quantizable_layers(adapted)


def test_a_layer_computes_with_the_grid_values() -> None:
    layer, x = nn.Linear(9, 5), torch.randn(2, 3, 9)
    plain = layer(x)
    install_quantizers({"layer": layer})
    weight, inputs = on_int8_grid(layer.weight), on_int8_grid(x)
    assert torch.equal(layer(x), nn.functional.linear(inputs, weight, layer.bias))
    assert not torch.equal(layer(x), plain)


def test_removal_restores_the_model_exactly() -> None:
    model = tiny_models.bert()
    keys, plain = list(model.state_dict()), logits(model)
    classes = [type(module) for module in model.modules()]
    chosen = quantizable_layers(model)
    install_quantizers(chosen)
    assert list(model.state_dict()) == keys
    assert fake_quantized_modules(model) == list(chosen)
    quantized = logits(model)
    assert 0 < tiny_models.relative_error(plain, quantized) < 0.1
    remove_fake_quantizers(model)
    assert [type(module) for module in model.modules()] == classes
    assert fake_quantized_modules(model) == []
    assert torch.equal(logits(model), plain)


def test_a_gated_quantized_layer_equals_the_smaller_quantized_layer() -> None:
    big, x = nn.Linear(10, 6), torch.randn(4, 10)
    with torch.no_grad():
        big.weight[:, 2] = 30.0  # dominates every row, unless it is removed
        x[:, 7] = 90.0
    kept = torch.tensor([0, 1, 3, 4, 5, 6, 8, 9])
    small = nn.Linear(8, 6)
    small.load_state_dict({"weight": big.weight[:, kept], "bias": big.bias})
    gate = torch.zeros(10).index_fill(0, kept, 1.0)
    attach("big", big).input_gates.append(lambda: gate)
    install_quantizers({"big": big, "small": small})
    torch.testing.assert_close(big(x), small(x[:, kept]), rtol=1e-6, atol=1e-6)
    remove_fake_quantizers(big)
    assert attachment_of(big).input_gates, "removing the quantizer took the gate along"


def test_gradients_reach_weights_and_inputs() -> None:
    model = tiny_models.bert().train()
    install_quantizers(quantizable_layers(model))
    model(input_ids=example_ids(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_a_second_fake_quantizer_or_a_patched_layer_raises_and_changes_nothing() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    install_quantizers({"second": second})
    with pytest.raises(TargetError, match="'second' has a fake quantizer already"):
        install_quantizers({"first": first, "second": second})
    remove_fake_quantizers(second)
    second.forward = lambda x: x
    with pytest.raises(TargetError, match="'second': its forward was replaced"):
        install_quantizers({"first": first, "second": second})
    assert type(first) is nn.Linear


def test_a_copy_of_a_quantized_model_is_quantized_alike() -> None:
    model = tiny_models.bert()
    install_quantizers(quantizable_layers(model))
    duplicate = copy.deepcopy(model)
    assert torch.equal(logits(duplicate), logits(model))
    remove_fake_quantizers(duplicate)
    assert fake_quantized_modules(model)


def test_a_compiled_model_notices_the_quantizers() -> None:
    torch.compiler.reset()
    model = tiny_models.bert(num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    assert tiny_models.relative_error(logits(model), logits(compiled)) < 1e-5
    install_quantizers(quantizable_layers(model))
    quantized = logits(compiled)
    assert tiny_models.relative_error(logits(model), quantized) < 1e-2
    remove_fake_quantizers(model)
    assert tiny_models.relative_error(logits(model), logits(compiled)) < 1e-5
    assert tiny_models.relative_error(logits(model), quantized) > 1e-4
