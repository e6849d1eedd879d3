import copy
import functools

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BertConfig, PreTrainedModel

from hf_compress import GraphError, ShrinkError, dimension_groups, make_example_inputs, plan_shrink, shrink

BUILDERS = dict(tiny_models.ZOO)


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        copied = type(model)(copy.deepcopy(model.config)).eval()
    assert all(t.is_meta for t in (*copied.parameters(), *copied.buffers()))
    return copied


def real_model(name: str) -> PreTrainedModel:
    model = BUILDERS[name]()
    # Experts run as batched products on fake tensors; the same operators must run here for an equal graph.
    model.config._experts_implementation = "batched_mm"
    return model


def described(group):
    parts = {
        role: [(s.parameter, s.dim, s.index.tolist()) for s in getattr(group, role)]
        for role in ("slices", "gates", "buffers")
    }
    return {"kind": group.kind, "units": group.num_units, "weights": group.parameters_per_unit,
            "frozen": group.frozen, **parts}  # fmt: skip


def test_all_tiny_models_are_compared() -> None:
    assert {"bert", "llama", "t5", "mixtral", "deberta_v2", "vit"} <= BUILDERS.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_groups_without_weights_are_those_of_the_real_model(name) -> None:
    model = real_model(name)
    expected = {group.name: described(group) for group in dimension_groups(model)}
    found = {group.name: described(group) for group in dimension_groups(meta_copy(model))}
    assert list(found) == list(expected)
    for group in expected:
        assert found[group] == expected[group]


@pytest.mark.parametrize("name", BUILDERS)
def test_plans_without_weights_are_those_of_the_real_model(name) -> None:
    model = real_model(name)
    masks = {
        group.name: torch.arange(group.num_units) % 2 == 0
        for group in dimension_groups(model)
        if group.frozen is None and group.kind in ("heads", "ffn")
    }
    plan = plan_shrink(meta_copy(model), masks)
    assert plan == plan_shrink(model, masks)
    assert plan.num_parameters[1] < plan.num_parameters[0]


def test_a_model_of_eight_billion_weights() -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    groups = {group.name: group for group in dimension_groups(model)}
    assert sum(p.numel() for p in model.parameters()) > 8e9
    heads, ffn = groups["model.layers.31.self_attn.heads"], groups["model.layers.31.mlp.ffn"]
    assert (heads.num_units, heads.parameters_per_unit) == (8, 4096 * 128 * (4 + 1 + 1 + 4))
    assert (ffn.num_units, ffn.parameters_per_unit) == (14336, 3 * 4096)


def test_the_model_on_the_meta_device_stays_as_it_was() -> None:
    model = meta_copy(tiny_models.mixtral()).train()
    model.lm_head.weight = model.model.embed_tokens.weight  # tied
    owned = [(d, dict(d)) for m in model.modules() for d in (vars(m), m._parameters, m._buffers)]
    state = torch.get_rng_state()
    dimension_groups(model)
    for now, before in owned:
        assert now.keys() == before.keys()
        assert all(now[key] is before[key] for key in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._experts_implementation == "grouped_mm"
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_stays_as_it_was_when_it_fails_too() -> None:
    model = meta_copy(tiny_models.bert())
    with pytest.raises(GraphError, match=r"Bert.*failed on the example inputs"):
        dimension_groups(model, {"input_ids": torch.zeros(1, 99, dtype=torch.long)})  # more than its positions
    assert all(type(p) is nn.Parameter and p.is_meta for p in model.parameters())


def test_weights_can_be_loaded_after_the_analysis() -> None:
    real = tiny_models.llama()
    empty = meta_copy(real)
    dimension_groups(empty)
    empty.load_state_dict(real.state_dict(), assign=True)
    empty.model.rotary_emb = copy.deepcopy(real.model.rotary_emb)
    inputs = make_example_inputs(real)
    with torch.no_grad():
        assert torch.equal(empty(**inputs).logits, real(**inputs).logits)


def test_a_model_with_a_part_on_the_meta_device() -> None:
    model = tiny_models.bert()
    expected = [described(group) for group in dimension_groups(model)]
    model.bert.encoder.layer[1].to("meta")
    assert [described(group) for group in dimension_groups(model)] == expected
    assert model.bert.embeddings.word_embeddings.weight.device.type == "cpu"


def test_example_inputs_of_a_meta_model_are_real() -> None:
    inputs = make_example_inputs(meta_copy(tiny_models.bert()))
    expected = make_example_inputs(tiny_models.bert())
    assert all(torch.equal(inputs[key], expected[key]) for key in expected if isinstance(expected[key], torch.Tensor))


class Keeping(PreTrainedModel):
    """Stores what it computes in attributes, a plain one, a buffer and the cache of a method."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = torch.ones(12)
        self.register_buffer("shift", torch.zeros(12), persistent=False)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as models do
    def positions(self, length: int) -> torch.Tensor:
        return torch.arange(length)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen = self.positions(input_ids.shape[1])
        x = nn.functional.one_hot(input_ids % 8, 8).float() + self.seen[None, :, None]
        self.shift = self.shift + 1
        return self.down(self.up(x) * self.scale + self.shift)


def test_nothing_fake_is_left_behind() -> None:
    with torch.device("meta"):
        model = Keeping(BertConfig(vocab_size=20))
    inputs = {"input_ids": torch.arange(5).view(1, 5)}
    assert dimension_groups(model, inputs)
    assert not hasattr(model, "seen")
    assert not isinstance(model.positions(5), FakeTensor)
    assert not any(isinstance(t, FakeTensor) for t in (model.scale, model.shift, *model.parameters()))


class Reading(Keeping):
    """Decides by a value."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        hidden = self.up(x)
        return self.down(hidden if hidden.sum() > 0 else -hidden)


def test_a_forward_that_reads_values_needs_the_weights() -> None:
    inputs = {"input_ids": torch.arange(5).view(1, 5)}
    assert dimension_groups(Reading(BertConfig(vocab_size=20)), inputs)
    with torch.device("meta"):
        model = Reading(BertConfig(vocab_size=20))
    with pytest.raises(GraphError, match=r"Reading is on the meta device.*reads values.*Load the model with its"):
        dimension_groups(model, inputs)


def test_shrink_needs_weights() -> None:
    model = meta_copy(tiny_models.bert())
    masks = {"bert.encoder.layer.0.ffn": torch.arange(44) < 20}
    with pytest.raises(ShrinkError, match=r"meta device.*from_pretrained.*plan_shrink"):
        shrink(model, masks)
