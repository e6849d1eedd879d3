"""What training can be told, pruning without training can be told, too: rules, limits, rows, columns, blocks."""

import copy
import dataclasses
from typing import Any

import oneshot_models
import pytest
import torch
from oneshot_models import batches, for_language, gram_of_inputs, logit_error, prune, trained
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import ZOO

from hf_compress import PruningConfig, PruningRule, TargetError, dimension_groups, make_example_inputs, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.pruner import Pruner
from hf_compress.pruning.obs import inverse_hessian

ONCE = {"schedule": "one_shot", "begin": 0, "end": 1}
GRANULARITIES: dict[str, dict[str, Any]] = {
    "element": {},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "block": {"granularity": "block", "block_size": (5, 6)},
    "2:4": {"granularity": "2:4"},
}
RULES = (
    PruningRule(match=("layer.0.attention",), structures={"weights": 0.25}, allocation="per_layer"),
    PruningRule(match=("layer.1.intermediate", "layer.0.output"), criterion="l1", min_units=3),
)


def while_training(model: PreTrainedModel, config: PruningConfig, seed: int) -> dict[str, Tensor]:
    """Masks of groups that a callback would make of the same weights, and where the folded model is not zero."""
    pruner = Pruner(model, ModelGraph(model), dataclasses.replace(config, **ONCE), 2, seed=seed)
    pruner.update(1)
    groups = pruner.group_masks()
    pruner.fold()
    return {name: groups[name] if name in groups else model.get_parameter(name) != 0 for name in pruner.masks}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", ["level", "l1", "l2", "random"])
def test_the_same_weights_go_as_while_training(criterion: str, granularity: str) -> None:
    rules = RULES if granularity != "2:4" else (PruningRule(match=("layer.0",), criterion="random"),)
    config = PruningConfig(structures={"weights": 0.5}, criterion=criterion, rules=rules, **GRANULARITIES[granularity])
    seed = 3 if "random" in (criterion, *(rule.criterion for rule in rules)) else 0
    result = prune(trained("bert"), batches(1), config, seed=seed)
    expected = while_training(trained("bert"), config, seed)
    assert result.weight_masks.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(result.weight_masks[name], mask)
    assert sum(int((~mask).sum()) for mask in expected.values()) > 0


@pytest.mark.parametrize("structures", [{"heads": 0.5, "ffn": 0.5}, {"layers": 0.5}])
@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_the_same_units_go_as_while_training(criterion: str, structures: Any) -> None:
    rule = {"match": ("layer.1",), "criterion": "level", "max_layer_sparsity": 0.75}
    rules = (PruningRule(structures={"ffn": 0.75}, **rule),) if "ffn" in structures else ()
    config = PruningConfig(structures=structures, criterion=criterion, rules=rules)
    seed = int(criterion == "random")
    masks = prune(trained("bert"), batches(1), config, seed=seed).masks
    expected = while_training(trained("bert"), config, seed)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert masks.keys() == expected.keys() and not all(mask.all() for mask in masks.values())


def test_chance_follows_the_seed() -> None:
    config = PruningConfig(structures={"ffn": 0.5}, criterion="random")
    first, again, other = (prune(trained("bert"), batches(1), config, seed=seed).masks for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_convolutions_lose_single_weights() -> None:
    model = ZOO["vit"]()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    config = PruningConfig(structures={"weights": 0.5}, criterion="l2", granularity="row", allocation="per_layer")
    result = prune(model, [make_example_inputs(model)], config)
    for name in convolutions:
        rows = model.get_submodule(name).weight.flatten(1)
        assert int((rows == 0).all(1).sum()) == len(rows) // 2
    assert convolutions and {f"{name}.weight" for name in convolutions} <= result.weight_masks.keys()


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("criterion", ["level", "wanda", "obs", "random"])
@pytest.mark.parametrize("allocation", ["global", "per_layer"])
def test_units_of_weights_go_as_a_whole(criterion: str, granularity: str, allocation: str) -> None:
    model, before = trained("bert"), trained("bert").state_dict()
    config = PruningConfig(
        structures={"weights": 0.5}, criterion=criterion, allocation=allocation, **GRANULARITIES[granularity]
    )
    result = prune(model, batches(2), config)
    total = sum(mask.numel() for mask in result.weight_masks.values())
    kept = sum(int(mask.sum()) for mask in result.weight_masks.values())
    assert kept / total == pytest.approx(0.5, abs=0.02)
    high, wide = {"row": (1, 1000), "column": (1000, 1), "block": (5, 6)}[granularity]
    shares = set()
    for name, mask in result.weight_masks.items():
        assert not model.get_parameter(name)[~mask].any()
        for rows in mask.split(high):
            assert all(tile.all() or not tile.any() for tile in rows.split(wide, dim=1))
        shares.add(round(float(mask.float().mean()), 1))
        if criterion != "obs" or granularity == "row":  # outputs do not see each other
            assert torch.equal(model.get_parameter(name), before[name] * mask)
        elif mask.any() and not mask.all():
            assert not torch.equal(model.get_parameter(name), before[name] * mask)
    assert (shares == {0.5}) == (allocation == "per_layer")


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_making_up_for_columns_and_blocks_is_closer_than_their_size(granularity: str) -> None:
    data = for_language(batches(8))
    errors = {}
    for criterion in ("level", "wanda", "obs"):
        model = trained("llama")
        settings = {"allocation": "per_layer", **GRANULARITIES[granularity]}
        prune(model, data, PruningConfig(structures={"weights": 0.5}, criterion=criterion, **settings))
        errors[criterion] = logit_error(model, trained("llama"), data)
    assert errors["obs"] < (0.8 if granularity != "row" else 1.0) * min(errors["level"], errors["wanda"])


@pytest.mark.parametrize("granularity", ["column", "block"])
def test_each_row_is_the_least_squares_solution_for_what_reaches_it(granularity: str) -> None:
    """Damped normal equations of each row on its own inputs, in the model that comes out."""
    model, dense, data = trained("bert"), trained("bert"), batches(3)
    settings = {"allocation": "per_layer", **GRANULARITIES[granularity]}
    config = PruningConfig(structures={"weights": 0.5}, criterion="obs", options={"damping": 0.02}, **settings)
    result = prune(model, data, config)
    for name in [each for each in result.weight_masks if "layer.1" in each]:
        gram = gram_of_inputs(model, name.removesuffix(".weight"), data)
        hessian = inverse_hessian(gram, 0.02).inverse()
        weight = dense.get_parameter(name).detach().double()
        for row in range(0, len(weight), 7):
            kept = result.weight_masks[name][row]
            if kept.any():
                solution = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
                changed = model.get_parameter(name)[row, kept].double().detach()
                torch.testing.assert_close(changed, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("criterion", ["level", "wanda", "obs"])
def test_the_inputs_of_conv1d_come_first(criterion: str, granularity: str) -> None:
    """GPT-2 stores [inputs, outputs]; the same layers as Linear lose the same weights."""
    torch.manual_seed(0)
    model = ZOO["gpt2"]()
    data = [make_example_inputs(model, batch_size=4, seed=seed) for seed in range(3)]
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.load_state_dict({"weight": module.weight.detach().T, "bias": module.bias.detach()})
            other.set_submodule(name, linear)
    config = PruningConfig(
        structures={"weights": 0.5}, criterion=criterion, allocation="per_layer", **GRANULARITIES[granularity]
    )
    masks, expected = prune(model, data, config).weight_masks, prune(other, data, config).weight_masks
    assert masks.keys() == expected.keys() and len(masks) >= 8
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name].T)
        torch.testing.assert_close(model.get_parameter(name), other.get_parameter(name).T, rtol=1e-3, atol=1e-4)


def test_wanda_sums_the_scores_of_rows_and_columns() -> None:
    data, name = batches(3), "bert.encoder.layer.0.attention.self.query"
    norms = gram_of_inputs(trained("bert"), name, data).diagonal().sqrt()
    scores = trained("bert").get_submodule(name).weight.detach().abs().double() * norms
    for granularity, dim in (("row", 1), ("column", 0)):
        config = PruningConfig(
            structures={"weights": 0.25}, criterion="wanda", granularity=granularity, allocation="per_layer"
        )
        mask = prune(trained("bert"), data, config).weight_masks[f"{name}.weight"]
        sums = scores.sum(dim)
        wanted = sums > sums.kthvalue(len(sums) // 4).values
        assert torch.equal(mask.all(dim), wanted) and torch.equal(mask.any(dim), wanted)


@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize("criterion", ["level", "obs"])
def test_limits_of_layers_whose_weights_compete(criterion: str, granularity: str) -> None:
    config = PruningConfig(structures={"weights": 0.6}, criterion=criterion, **GRANULARITIES[granularity])
    most = {"element": 0.615, "column": 0.63}[granularity]
    lowest = {}
    for name, limits in {"none": {}, "share": {"max_layer_sparsity": most}, "units": {"min_units": 12}}.items():
        masks = prune(trained("bert"), batches(2), config, **limits).weight_masks
        lowest[name] = min(float(mask.float().mean()) for mask in masks.values())
        if name == "units" and granularity == "column":
            assert min(int(mask.any(0).sum()) for mask in masks.values()) == 12
    assert lowest["none"] < 1 - most <= lowest["share"] + 1e-6 < 0.4
    with pytest.raises(TargetError, match=r"min_units=30.* keep at least"):
        prune(trained("bert"), batches(1), config, granularity="column", min_units=30)


def test_rules_for_single_weights_with_criteria_of_their_own() -> None:
    """Each part has what the criterion alone would have given it, where no weights before it change."""
    first, second = r"layer\.0\.attention\.self", r"layer\.0\.output"
    config = PruningConfig(
        structures={"weights": 0.5},
        criterion="level",
        allocation="per_layer",
        rules=(
            PruningRule(match=(first,), criterion="wanda", structures={"weights": 0.25}),
            PruningRule(match=(second,), structures={"weights": 0.0}),
        ),
    )
    masks = prune(trained("bert"), batches(2), config).weight_masks
    wanda = prune(
        trained("bert"), batches(2), structures={"weights": 0.25}, criterion="wanda", allocation="per_layer"
    ).weight_masks
    level = prune(
        trained("bert"), batches(2), structures={"weights": 0.5}, criterion="level", allocation="per_layer"
    ).weight_masks
    for name, mask in masks.items():
        if "layer.0.attention.self" in name:
            assert torch.equal(mask, wanda[name])
        elif "layer.0.output" in name:
            assert mask.all()
        else:
            assert torch.equal(mask, level[name])
    result = prune(trained("bert"), batches(2), config)
    assert not any("layer.0.output" in name for name in result.changed)


@pytest.mark.parametrize("criterion", ["l2", "wanda", "obs", "kwon", "taylor", "fisher"])
def test_rules_for_units(criterion: str) -> None:
    model, data = trained("bert"), batches(3)
    config = PruningConfig(
        structures={"heads": 0.5, "ffn": 0.5},
        criterion=criterion,
        rules=(PruningRule(match=(r"layer\.0\.",), structures={"ffn": 0.25}),),
    )
    result = prune(model, data, config)
    kept = {name.removeprefix("bert.encoder.layer."): int(mask.sum()) for name, mask in result.masks.items()}
    # The rule leaves the heads of layer 0 to the config around it.
    assert kept["0.ffn"] == 48 and kept["1.ffn"] == 32
    assert kept["0.attention.heads"] + kept["1.attention.heads"] == 4
    small = shrink(model, result.masks)
    assert small.num_parameters() < model.num_parameters()


def test_parts_with_criteria_of_their_own_are_pruned_in_the_order_of_the_rules() -> None:
    """``obs`` comes after ``kwon``: it sees its scales."""
    model, data = trained("bert"), batches(3)
    config = PruningConfig(
        structures={"ffn": 0.5},
        criterion="obs",
        allocation="per_layer",
        rules=(PruningRule(match=(r"layer\.0\.",), criterion="kwon"),),
    )
    result = prune(model, data, config)
    one, other = trained("bert"), "bert.encoder.layer.1"
    alone = prune(one, data, structures={"ffn": 0.5}, criterion="kwon", exclude=[other], allocation="per_layer")
    then = prune(one, data, structures={"ffn": 0.5}, criterion="obs", exclude=["layer.0"], allocation="per_layer")
    for name, mask in {**alone.masks, **then.masks}.items():
        assert torch.equal(result.masks[name], mask)
    for name, values in one.state_dict().items():
        assert torch.equal(values, model.state_dict()[name])
    assert set(result.changed) == {*alone.changed, *then.changed}


def test_rules_may_cover_the_whole_model() -> None:
    rules = (
        PruningRule(match=(r"layer\.0\.",), criterion="l1"),
        PruningRule(match=(r"layer\.1\.",), criterion="l2"),
    )
    config = PruningConfig(structures={"ffn": 0.5}, rules=rules)
    result = prune(trained("bert"), batches(1), config)
    alone = {
        "l1": prune(trained("bert"), batches(1), structures={"ffn": 0.5}, criterion="l1", exclude=[r"layer\.1\."]),
        "l2": prune(trained("bert"), batches(1), structures={"ffn": 0.5}, criterion="l2", exclude=[r"layer\.0\."]),
    }
    expected = alone["l1"].masks | alone["l2"].masks
    assert len(expected) == 2 and result.masks.keys() == expected.keys()
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.items())


def test_a_rule_that_fails_undoes_what_those_before_it_did() -> None:
    model = trained("bert")
    before = oneshot_models.Snapshot(model)
    config = PruningConfig(
        structures={"ffn": 0.5}, criterion="fisher", rules=(PruningRule(match=(r"layer\.0\.",), criterion="obs"),)
    )
    without_labels = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches(2)]
    with pytest.raises(TargetError, match="gives no loss"):
        prune(model, without_labels, config)
    before.check()


def test_the_share_of_operations_with_limits_by_rules() -> None:
    floor = 60
    config = PruningConfig(
        structures=["heads", "ffn"],
        criterion="kwon",
        options={"flops": 0.6, "tune": False},
        rules=(PruningRule(match=(r"layer\.0\.ffn",), min_units=floor),),
    )
    masks = prune(trained("bert"), batches(3), config).masks
    free = prune(trained("bert"), batches(3), config, rules=()).masks
    assert int(free["bert.encoder.layer.0.ffn"].sum()) < floor <= int(masks["bert.encoder.layer.0.ffn"].sum())
    costs = ModelGraph(trained("bert")).costs
    assert costs.flops({name: int(mask.sum()) for name, mask in masks.items()}) <= 0.6 * costs.flops({})


def test_limits_by_rules_under_a_budget() -> None:
    groups = {group.name: group for group in dimension_groups(trained("bert")) if group.kind == "ffn"}
    assert len(groups) == 2
    config = PruningConfig(
        structures=["ffn"],
        criterion="l2",
        target_params=0.85,
        rules=(PruningRule(match=(r"layer\.0\.",), min_units=60),),
    )
    masks = prune(trained("bert"), batches(1), config).masks
    assert int(masks["bert.encoder.layer.0.ffn"].sum()) >= 60
    model = trained("bert")
    assert shrink(model, masks).num_parameters() <= 0.85 * model.num_parameters()
