import json

import pytest
import tiny_models
import torch

from hf_compress import ShrinkError, ShrinkPlan, TargetError, dimension_groups, plan_shrink, shrink
from hf_compress.shrinking.sizes import tensor_shapes

FFN0, FFN1 = "bert.encoder.layer.0.ffn", "bert.encoder.layer.1.ffn"
HEADS0 = "bert.encoder.layer.0.attention.heads"


def mask(size: int, *dropped: int) -> torch.Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[list(dropped)] = False
    return keep


def test_a_plan_says_which_positions_stay() -> None:
    plan = plan_shrink(tiny_models.bert(), {HEADS0: mask(4, 1), FFN0: mask(44, 0, 43)})
    assert plan.groups[HEADS0].kept == (0, 2, 3)
    query = plan.keep["bert.encoder.layer.0.attention.self.query.weight"]
    assert query == {0: [*range(8), *range(16, 32)]}
    assert plan.keep["bert.encoder.layer.0.output.dense.weight"] == {1: list(range(1, 43))}
    assert plan.zero["bert.encoder.layer.0.output.dense.weight"] == {1: [0, 43]}


def test_parameter_counts_are_those_of_the_shrunk_model() -> None:
    model = tiny_models.bert()
    plan = plan_shrink(model, {HEADS0: mask(4, 1), FFN0: mask(44, 0, 43)})
    per_head, per_unit = 3 * 8 * 33 + 8 * 32, 2 * 32 + 1
    assert plan.num_parameters == (model.num_parameters(), model.num_parameters() - per_head - 2 * per_unit)


def test_what_moves_to_a_layer_that_stays_is_counted() -> None:
    """T5's position bias is a parameter of the first layer of each stack."""
    model = tiny_models.t5()
    layers = next(g for g in dimension_groups(model) if g.kind == "layers" and g.frozen is None)
    masks = {layers.name: mask(2, 0)}
    assert plan_shrink(model, masks).num_parameters[1] == shrink(model, masks).num_parameters()


def test_json_round_trip_is_exact() -> None:
    plan = plan_shrink(tiny_models.bert(), {HEADS0: mask(4, 1), FFN0: mask(44, 3)}, multiple_of=4)
    assert ShrinkPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["model_class"] == "BertForSequenceClassification"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": 3}', '{"model_class": "X", "groups": {"a": {}}}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ShrinkError, match="not a plan"):
        ShrinkPlan.from_json(text)


def test_summary_names_groups_and_savings() -> None:
    text = plan_shrink(tiny_models.bert(), {HEADS0: mask(4, 1)}).summary()
    assert f"{HEADS0}: keeps 3 of 4 (removes 1)" in text
    assert "% removed" in text


def test_uniform_keeps_the_largest_count_everywhere_and_silences_the_rest() -> None:
    masks = {FFN0: mask(44, *range(20)), FFN1: mask(44, *range(10))}
    plan = plan_shrink(tiny_models.bert(), masks, uniform=True)
    assert [len(plan.groups[name].kept) for name in (FFN0, FFN1)] == [34, 34]
    assert len(plan.groups[FFN0].silenced) == 10
    assert set(plan.groups[FFN0].silenced) <= set(range(20))
    # Silenced units stay in size and are zero in effect.
    assert plan.zero["bert.encoder.layer.0.output.dense.weight"] == {1: list(range(20))}


def test_uniform_counts_layers_that_lose_nothing() -> None:
    with pytest.raises(ShrinkError, match="keep every unit"):
        plan_shrink(tiny_models.bert(), {FFN0: mask(44, 5)}, uniform=True)


@pytest.mark.parametrize(("removed", "kept"), [(1, 44), (4, 40), (5, 40), (13, 32), (43, 8)])
def test_multiple_of_rounds_widths_up(removed: int, kept: int) -> None:
    masks = {FFN0: mask(44, *range(removed)), HEADS0: mask(4, 1)}
    plan = plan_shrink(tiny_models.bert(), masks, multiple_of=8)
    assert len(plan.groups[HEADS0].kept) == 3  # heads are not widths
    size = len(plan.groups[FFN0].kept) if FFN0 in plan.groups else 44
    assert size == kept


def test_parameter_masks_remove_units_that_they_cover() -> None:
    model = tiny_models.bert()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    keep = torch.ones(44, 32, dtype=torch.bool)
    keep[[2, 7]] = False
    keep[9, :31] = False  # one weight left: the unit stays
    plan = plan_shrink(model, {name: keep})
    assert sorted(set(range(44)) - set(plan.groups[FFN0].kept)) == [2, 7]


def test_parameter_mask_over_part_of_a_head_keeps_the_head() -> None:
    name = "bert.encoder.layer.0.attention.self.value.weight"
    keep = torch.ones(32, 32, dtype=torch.bool)
    keep[:15] = False  # head 0 and most of head 1
    plan = plan_shrink(tiny_models.bert(), {name: keep})
    assert plan.groups[HEADS0].kept == (1, 2, 3)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (None, ShrinkError, "no masks given"),
        ({}, ShrinkError, "no masks given"),
        ({"bert.encoder.layer.0.ffm": mask(44, 1)}, TargetError, f"closest match: '{FFN0}'"),
        ({FFN0: mask(43, 1)}, ShrinkError, r"allowed: torch.bool \(44,\)"),
        ({FFN0: mask(44, 1).float()}, ShrinkError, r"got torch.float32 \(44,\)"),
        ({FFN0: [True] * 44}, ShrinkError, "got list"),
        ([FFN0], ShrinkError, "masks is a list"),
        ({FFN0: mask(44, 1).to("meta")}, ShrinkError, "on the meta device"),
        ({"other": torch.zeros(32, dtype=torch.bool)}, ShrinkError, "removes all 32 units"),
        ({FFN0: mask(44)}, ShrinkError, "keep every unit"),
        ({"classifier.other": mask(3, 1)}, TargetError, "cannot lose units: it is a dimension of the model's output"),
        (
            {"bert.encoder.layer.0.output.dense.weight": torch.eye(32, 44, dtype=torch.bool)[:, :44] | mask(44, 3)},
            ShrinkError,
            "no whole unit",
        ),
    ],
)
def test_bad_masks_are_refused(masks, error, message) -> None:
    model = tiny_models.bert()
    before = tensor_shapes(model)
    with pytest.raises(error, match=message):
        plan_shrink(model, masks)
    assert tensor_shapes(model) == before


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_multiple_of_must_be_a_count(value) -> None:
    with pytest.raises(ShrinkError, match="multiple_of"):
        plan_shrink(tiny_models.bert(), {FFN0: mask(44, 1)}, multiple_of=value)


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "torchao"}, {"quant_method": "hf_compress", "inner": {"quant_method": "torchao"}}],
    ids=["even", "uneven"],
)
def test_quantized_models_are_refused(quantization) -> None:
    model = tiny_models.bert()
    model.config.quantization_config = quantization
    with pytest.raises(ShrinkError, match=r"quantized already \(quant_method torchao\)"):
        plan_shrink(model, {FFN0: mask(44, 1)})
