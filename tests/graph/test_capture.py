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
from hf_compress.graph.capture import capture

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


class Counting(Keeping):
    """Decides by values of the inputs, which are known: how many tokens, which of them count."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        longest = int(attention_mask.sum(dim=1).max())
        if not attention_mask.any():
            return self.down(self.scale)
        hidden = self.up(input_ids[..., None].expand(-1, -1, 8).float())[:, :longest]
        last = input_ids[:, :longest].eq(7)
        if len(torch.unique_consecutive(last.sum(1))) > 1:
            raise ValueError("all examples must have the same number of ends")
        return self.down(hidden[last, :].view(len(hidden), -1, 12)[:, -1])


def test_values_of_inputs_are_known() -> None:
    inputs = {
        "input_ids": torch.tensor([[1, 7, 2, 7], [7, 7, 3, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    expected = [described(group) for group in dimension_groups(Counting(BertConfig()), inputs)]
    with torch.device("meta"):
        model = Counting(BertConfig())
    assert [described(group) for group in dimension_groups(model, inputs)] == expected
    assert any(group["units"] == 12 for group in expected)
    with pytest.raises(GraphError, match="same number of ends"):
        dimension_groups(model, {**inputs, "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])})


class Overwriting(Keeping):
    """Writes into an input, through a view."""

    write = "known"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        if self.write == "known":
            input_ids[0].copy_(torch.ones(5, dtype=torch.long))
        elif self.write == "random":
            input_ids[0].random_(3)
        else:
            input_ids[0].copy_(self.up(x).argmax(-1)[0])
        return self.down(self.up(x)) + input_ids.sum().item()


@pytest.mark.parametrize("write", ["known", "random", "unknown"])
def test_values_that_were_written_over_are_not_known(write) -> None:
    with torch.device("meta"):
        model = Overwriting(BertConfig())
    model.write = write
    inputs = {"input_ids": torch.arange(5).view(1, 5)}
    if write == "known":
        assert dimension_groups(model, inputs)
    else:
        with pytest.raises(GraphError, match=r"reads values of tensors, in Overwriting \(DataDependent"):
            dimension_groups(model, inputs)
    assert inputs["input_ids"].tolist() == [[0, 1, 2, 3, 4]]


class Turned(Keeping):
    """Multiplies a transposed tensor: torch does that in one way for weights that learn, in another for others."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        return self.down(self.up(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("learns", [True, False])
def test_frozen_and_learning_weights_run_the_same_operators_as_real_ones(learns) -> None:
    real = Turned(BertConfig()).requires_grad_(learns)
    with torch.device("meta"):
        empty = Turned(BertConfig()).requires_grad_(learns)
    inputs = {"input_ids": torch.arange(10).view(2, 5)}
    products = [
        [str(node.target) for node in capture(model, inputs).graph.nodes if "mm" in str(node.target)]
        for model in (real, empty)
    ]
    assert products[0] == products[1]
    assert len(products[0]) == 2


def test_shrink_needs_weights() -> None:
    model = meta_copy(tiny_models.bert())
    masks = {"bert.encoder.layer.0.ffn": torch.arange(44) < 20}
    with pytest.raises(ShrinkError, match=r"meta device.*from_pretrained.*plan_shrink"):
        shrink(model, masks)


def test_a_model_in_training_mode_is_recorded_as_it_evaluates() -> None:
    model = tiny_models.bert()
    inputs = make_example_inputs(model)

    def operators() -> list[str]:
        return [str(node.target) for node in capture(model, inputs).graph.nodes]

    expected = operators()
    model.train()
    model.bert.encoder.eval()
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    assert operators() == expected
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
