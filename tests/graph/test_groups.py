import copy

import pytest
import tiny_models
import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel
from zoo import ALL

from hf_compress import GraphError, dimension_groups
from hf_compress.graph.groups import unit_of_position


def by_name(model, **kwargs):
    return {group.name: group for group in dimension_groups(model, **kwargs)}


def slices(group):
    return {(s.parameter, s.dim): s.index for s in group.slices}


def test_bert_heads_own_rows_of_query_key_value_and_columns_of_the_output() -> None:
    group = by_name(tiny_models.bert())["bert.encoder.layer.0.attention.heads"]
    prefix = "bert.encoder.layer.0.attention"
    expected = {(f"{prefix}.self.{x}.{p}", 0) for x in ("query", "key", "value") for p in ("weight", "bias")}
    expected.add((f"{prefix}.output.dense.weight", 1))
    assert set(slices(group)) == expected
    assert (group.kind, group.num_units, group.frozen) == ("heads", 4, None)
    assert all(index.tolist()[1] == list(range(8, 16)) for index in slices(group).values())
    assert [(s.parameter, s.dim) for s in group.gates] == [(f"{prefix}.output.dense.weight", 1)]
    assert group.parameters_per_unit == 3 * (8 * 32 + 8) + 8 * 32


def test_bert_ffn_units_are_rows_and_columns() -> None:
    group = by_name(tiny_models.bert())["bert.encoder.layer.1.ffn"]
    layer = "bert.encoder.layer.1"
    assert set(slices(group)) == {
        (f"{layer}.intermediate.dense.weight", 0),
        (f"{layer}.intermediate.dense.bias", 0),
        (f"{layer}.output.dense.weight", 1),
    }
    assert group.num_units == 44
    assert slices(group)[f"{layer}.output.dense.weight", 1].tolist() == [[i] for i in range(44)]


def test_gpt2_heads_lie_in_three_blocks_of_the_fused_projection() -> None:
    group = next(g for g in dimension_groups(tiny_models.gpt2()) if g.kind == "heads")
    fused = slices(group)["transformer.h.0.attn.c_attn.weight", 1]
    assert fused.tolist()[0] == [*range(8), *range(32, 40), *range(64, 72)]


def test_grouped_query_heads_are_units_of_key_heads() -> None:
    groups = by_name(tiny_models.llama())
    heads = groups["model.layers.0.self_attn.heads"]
    assert heads.num_units == 2
    assert slices(heads)["model.layers.0.self_attn.q_proj.weight", 0].shape == (2, 16)
    assert slices(heads)["model.layers.0.self_attn.k_proj.weight", 0].shape == (2, 8)


def test_shared_layers_make_one_group() -> None:
    assert [g.name for g in dimension_groups(tiny_models.albert()) if g.kind in ("heads", "ffn")] == [
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.heads",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
    ]


@pytest.mark.parametrize(
    ("build", "heads", "ffn"),
    [
        (tiny_models.roberta, 2, 2),
        (tiny_models.distilbert, 2, 2),
        (tiny_models.electra, 2, 2),
        (tiny_models.modernbert, 2, 2),
        (tiny_models.gpt_neox, 2, 2),
        (tiny_models.phi3, 2, 2),
        (tiny_models.bart, 6, 4),
        (tiny_models.t5, 3, 4),  # encoder, decoder self, decoder cross: a position bias ties the layers' heads
        (tiny_models.vit, 2, 2),
    ],
)
def test_other_architectures_need_no_code_of_their_own(build, heads, ffn) -> None:
    groups = [g for g in dimension_groups(build()) if g.frozen is None]
    assert sum(g.kind == "heads" for g in groups) == heads
    assert sum(g.kind == "ffn" for g in groups) == ffn


def test_eager_attention_gives_the_same_groups_as_sdpa() -> None:
    sdpa, eager = tiny_models.bert(), tiny_models.bert(attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    found = [{g.name: slices(g) for g in dimension_groups(m) if g.kind in ("heads", "ffn")} for m in (sdpa, eager)]
    assert found[0].keys() == found[1].keys()
    for name, parts in found[0].items():
        assert parts.keys() == found[1][name].keys()
        assert all(torch.equal(index, found[1][name][key]) for key, index in parts.items())


def test_frozen_groups_say_which_operator_forbids_it() -> None:
    groups = by_name(tiny_models.bert())
    assert groups["bert.hidden"].frozen is None
    assert "embedding in bert.embeddings.word_embeddings" in groups["bert.embeddings.word_embeddings.vocab"].frozen
    assert "output" in groups["classifier.other"].frozen


def test_the_pooler_is_not_a_feed_forward_layer() -> None:
    pooler = [g for g in dimension_groups(tiny_models.bert()) if any("pooler" in s.parameter for s in g.slices)]
    assert {g.kind for g in pooler} == {"hidden", "other"}


def test_the_table_lists_every_group() -> None:
    groups = dimension_groups(tiny_models.bert())
    lines = str(groups).splitlines()
    assert len(lines) == len(groups) + 1
    assert lines[0].split() == ["kind", "name", "units", "weights/unit", "prunable"]


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = tiny_models.bert().train()
    model.bert.pooler.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    dimension_groups(model)
    assert model.training and not model.bert.pooler.training and model.bert.encoder.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_that_do_not_run_are_named() -> None:
    with pytest.raises(GraphError, match=r"Bert.*\.forward failed.*input_ids.*Pass example_inputs"):
        dimension_groups(tiny_models.bert(), {"input_ids": torch.full((1, 4), 10**6)})


def test_a_model_without_a_config_needs_example_inputs() -> None:
    with pytest.raises(GraphError, match=r"Linear has no config .* pass example_inputs"):
        dimension_groups(nn.Linear(2, 2))


def test_own_example_inputs_are_used() -> None:
    groups = by_name(tiny_models.bert(), example_inputs={"input_ids": torch.arange(6).view(1, 6)})
    assert groups["bert.encoder.layer.0.ffn"].num_units == 44


class Mixed(PreTrainedModel):
    """A model of another make: its feed-forward units are read by number, its attention is a plain sum."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        hidden = self.up(x)
        hidden = hidden * (hidden[..., 3:4] > 0)  # one unit decides for all: none may be removed blindly
        return self.down(hidden)


def test_a_unit_that_is_read_by_number_splits_its_group() -> None:
    model = Mixed(BertConfig(vocab_size=20))
    groups = list(dimension_groups(model, {"input_ids": torch.arange(5).view(1, 5)}))
    units = {g.num_units for g in groups}
    # Unit 3 is cut out by position: units before and after it are other segments, never one group of 12.
    assert 12 not in units


def test_unit_of_position_inverts_the_index() -> None:
    group = next(g for g in dimension_groups(tiny_models.gpt2()) if g.kind == "heads")
    part = next(s for s in group.slices if "c_attn.weight" in s.parameter)
    owner = unit_of_position(part, 96)
    assert all(owner[position] == unit for unit, row in enumerate(part.index.tolist()) for position in row)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t5", ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] * 2),
        # The second layer has experts, so it cannot become the first, and nothing is handed on.
        ("switch_transformers", []),
        ("bert", []),
    ],
)
def test_what_the_first_layer_hands_on(name: str, expected: list[str]) -> None:
    """Where the first layer may go, the next one takes over what it makes for all."""
    groups = [group for group in dimension_groups(ALL[name]()) if group.kind == "layers"]
    found = [inner.replace("decoder", "encoder") for group in groups for inner in group.handed_on]
    assert found == expected
