import copy
import functools

import pytest
import tiny_models
import torch
from torch import nn

from hf_compress import ShrinkError, dimension_groups, make_example_inputs, plan_shrink, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.shrinking.apply import silence, slice_in_place
from hf_compress.shrinking.sizes import tensor_shapes

FFN = [f"bert.encoder.layer.{i}.ffn" for i in range(2)]
HEADS = [f"bert.encoder.layer.{i}.attention.heads" for i in range(2)]


def keep(size: int, *kept: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def uneven_masks() -> dict[str, torch.Tensor]:
    return {
        HEADS[0]: keep(4, 2),
        HEADS[1]: keep(4, 0, 1, 3),
        FFN[0]: keep(44, *range(10)),
        FFN[1]: keep(44, *range(3, 40)),
    }


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or make_example_inputs(model, batch_size=5, length=9, seed=7))).logits


def test_the_shrunk_model_equals_a_model_whose_units_are_gated_off() -> None:
    """The reference is written by hand: hooks zero the inputs of the consumers."""
    model = tiny_models.bert()
    small = shrink(model, uneven_masks())
    masked = copy.deepcopy(model)
    for i, layer in enumerate(masked.bert.encoder.layer):
        heads = uneven_masks()[HEADS[i]].repeat_interleave(8)
        ffn = uneven_masks()[FFN[i]]
        layer.attention.output.dense.register_forward_pre_hook(lambda m, a, h=heads: (a[0] * h,))
        layer.output.dense.register_forward_pre_hook(lambda m, a, f=ffn: (a[0] * f,))
    assert tiny_models.relative_error(logits(masked), logits(small)) < 1e-5
    assert tiny_models.relative_error(logits(model), logits(small)) > 1e-2  # the masks matter


def test_sizes_are_those_of_the_masks() -> None:
    small = shrink(tiny_models.bert(), uneven_masks())
    first, second = small.bert.encoder.layer
    assert first.attention.self.query.weight.shape == (8, 32)
    assert second.attention.output.dense.weight.shape == (32, 24)
    assert (first.intermediate.dense.out_features, second.output.dense.in_features) == (10, 37)


def test_the_original_is_untouched() -> None:
    model = tiny_models.bert()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    shrink(model, uneven_masks())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config


def test_a_wrapper_around_forward_stays_with_the_original() -> None:
    """It holds on to the original's own forward, as autocast in mixed precision and fused language heads do."""
    plain, model = tiny_models.bert(), tiny_models.bert()
    own = model.forward

    @functools.wraps(type(model).forward)
    def wrapped(*args, **kwargs):
        return own(*args, **kwargs)

    model.forward = wrapped
    small = shrink(model, uneven_masks())
    assert model.forward is wrapped
    assert torch.equal(logits(small), logits(shrink(plain, uneven_masks())))
    with torch.no_grad():
        model.classifier.bias.add_(1.0)  # the result has weights of its own
    assert torch.equal(logits(small), logits(shrink(plain, uneven_masks())))


def test_the_result_trains() -> None:
    small = shrink(tiny_models.bert(), uneven_masks()).train()
    inputs = make_example_inputs(small)
    small(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    missing = [name for name, p in small.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    assert missing == []


def test_uniform_sizes_become_a_stock_config() -> None:
    masks = {FFN[0]: keep(44, *range(10)), FFN[1]: keep(44, *range(5, 25))}
    model = tiny_models.bert()
    small = shrink(model, masks, uniform=True)
    assert small.config.intermediate_size == 20
    assert getattr(small.config, "quantization_config", None) is None
    rebuilt = type(small)(small.config)
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(logits(rebuilt.eval()), logits(small))
    assert model.config.intermediate_size == 44


def test_uneven_sizes_are_described_for_the_loader() -> None:
    small = shrink(tiny_models.bert(), uneven_masks())
    described = small.config.quantization_config
    assert described["quant_method"] == "hf_compress"
    assert described["units"][HEADS[0]] == {"kept": 1, "of": 4}
    assert described["shapes"]["bert.encoder.layer.1.intermediate.dense.bias"] == [37]


def test_tied_weights_stay_tied() -> None:
    small = shrink(tiny_models.gpt2(), {"transformer.h.0.mlp.ffn": keep(44, 1, 2, 3)})
    assert small.lm_head.weight is small.transformer.wte.weight


def test_a_lower_precision_model_is_verified_with_its_own_tolerance() -> None:
    small = shrink(tiny_models.bert().to(torch.bfloat16), uneven_masks())
    assert small.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("build", "module", "changed"),
    [
        (tiny_models.deberta_v2, "deberta.encoder.layer.0.attention.self", {"num_attention_heads": 2}),
        (tiny_models.gpt2, "transformer.h.0.attn", {"split_size": 16}),
        (tiny_models.opt, "model.decoder.layers.0.self_attn", {"num_heads": 2}),
    ],
)
def test_attributes_that_forward_reads_follow_the_sizes(build, module, changed) -> None:
    """DeBERTa would run and give wrong numbers, GPT-2 and OPT would not run."""
    model = build()
    masks = {g.name: keep(4, 0, 3) for g in dimension_groups(model) if g.kind == "heads"}
    small = shrink(model, masks)
    for name, value in changed.items():
        assert getattr(small.get_submodule(module), name) == value
        assert getattr(model.get_submodule(module), name) == 2 * value


def test_a_config_that_one_layer_reads_is_its_own() -> None:
    """Phi-3 takes the number of heads from the config that all layers share."""
    model = tiny_models.phi3()
    masks = {g.name: keep(2, i) for i, g in enumerate(g for g in dimension_groups(model) if g.kind == "heads")}
    masks.pop("model.layers.1.self_attn.heads")
    small = shrink(model, masks)
    counts = [layer.self_attn.config.num_attention_heads for layer in small.model.layers]
    assert counts == [2, 4] and small.config.num_attention_heads == 4


def test_one_attribute_for_two_sizes_is_an_error() -> None:
    """Queries and values of BERT share attention_head_size."""
    model = tiny_models.bert()
    group = next(g for g in dimension_groups(model) if g.kind == "head_dim" and g.frozen is None)
    before = tensor_shapes(model)
    with pytest.raises(ShrinkError, match=r"attention_head_size would have to be 2 .* and 8 for a tensor shape"):
        shrink(model, {group.name: keep(8, 0, 3)})
    assert tensor_shapes(model) == before


def test_verification_names_the_first_module_that_differs(monkeypatch) -> None:
    """Without the attributes, DeBERTa's numbers are wrong and nothing else would say so."""
    monkeypatch.setattr(ModelGraph, "attributes_after", lambda self, kept: {})
    model = tiny_models.deberta_v2()
    masks = {g.name: keep(4, 0, 3) for g in dimension_groups(model) if g.kind == "heads"}
    before = tensor_shapes(model)
    with pytest.raises(ShrinkError, match=r"first module that differs: 'deberta\.encoder\.layer\.0"):
        shrink(model, masks)
    assert tensor_shapes(model) == before


def test_verification_catches_a_model_that_does_not_run(monkeypatch) -> None:
    monkeypatch.setattr(ModelGraph, "attributes_after", lambda self, kept: {})
    model = tiny_models.gpt2()
    masks = {g.name: keep(4, 0) for g in dimension_groups(model) if g.kind == "heads"}
    with pytest.raises(ShrinkError, match="does not run after shrinking"):
        shrink(model, masks)


def test_anything_but_a_model_or_trainer_is_refused() -> None:
    with pytest.raises(ShrinkError, match="PreTrainedModel or a Trainer"):
        shrink(nn.Linear(2, 2), {"x": keep(2, 0)})


def test_a_plan_for_another_model_is_refused_before_anything_is_cut() -> None:
    plan = plan_shrink(tiny_models.bert(), uneven_masks())
    other = tiny_models.bert(intermediate_size=8)
    before = tensor_shapes(other)
    with pytest.raises(ShrinkError, match="do not fit its shape"):
        slice_in_place(other, plan)
    assert tensor_shapes(other) == before


def test_silencing_is_exact() -> None:
    """Zero columns in the consumer and a smaller consumer give the same numbers."""
    model = tiny_models.bert()
    plan = plan_shrink(model, uneven_masks())
    silence(model, plan.zero)
    assert tiny_models.relative_error(logits(model), logits(shrink(tiny_models.bert(), uneven_masks()))) < 1e-5


def test_a_layer_keeps_its_own_integers_when_the_one_before_it_goes() -> None:
    """The attention of layer 0 is cut and then goes as a whole; layer 1 computes as before."""
    model = tiny_models.bert()
    inside = [g.name for g in dimension_groups(model) if g.kind == "head_dim" and "layer.0" in g.name]
    masks = {name: keep(8, 0, 1, 2, 3, 4, 5) for name in inside}
    small = shrink(model, {**masks, "bert.encoder.layer.layers": keep(2, 1)})
    assert small.bert.encoder.layer[0].attention.self.attention_head_size == 8
