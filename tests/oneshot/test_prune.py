"""Pruning without training: what comes out is right, whatever the criterion."""

import copy
import dataclasses
from typing import Any

import oneshot_models
import pytest
import tiny_models
import torch
from masked_models import gated
from oneshot_models import Snapshot, batches, for_language, logit_error, trained
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress import (
    PruningCallback,
    PruningConfig,
    dimension_groups,
    make_example_inputs,
    make_labels,
    prune_oneshot,
    shrink,
)
from hf_compress.oneshot.prune import OneShotResult
from hf_compress.oneshot.settings import CRITERIA

UNIT_CRITERIA = [name for name, each in CRITERIA.items() if each.units is not None]
WEIGHT_CRITERIA = [name for name, each in CRITERIA.items() if each.weights is not None]


def prune(model: PreTrainedModel, criterion: str, structures: Any, data: Any = None, **keywords: Any) -> OneShotResult:
    if data is None:
        data = batches(3)
        data = data if model.config.model_type == "bert" else for_language(data)
    return oneshot_models.prune(model, data, structures=structures, criterion=criterion, **keywords)


def structures_for(criterion: str) -> dict[str, float]:
    return {"heads": 0.5, "ffn": 0.5} if "heads" in CRITERIA[criterion].structures else {"layers": 0.5}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("criterion", UNIT_CRITERIA)
def test_the_masked_model_is_the_small_one(kind: str, criterion: str) -> None:
    model, data = trained(kind), batches(2, seed=9)
    wanted = structures_for(criterion)
    result = prune(model, criterion, wanted)
    groups = {group.name: group for group in dimension_groups(model)}
    for kind_of_units, sparsity in wanted.items():
        mine = [mask for name, mask in result.masks.items() if groups[name].kind == kind_of_units]
        assert sum(int(mask.sum()) for mask in mine) == round((1 - sparsity) * sum(len(mask) for mask in mine))
    small = shrink(model, result.masks)
    with gated(model, groups.values(), result.masks):
        masked = oneshot_models.logits(model, data)
    torch.testing.assert_close(oneshot_models.logits(small, data), masked, rtol=1e-4, atol=1e-4)
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("criterion", UNIT_CRITERIA)
def test_only_what_is_told_changes(criterion: str) -> None:
    model = trained("bert").train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = Snapshot(model)
    result = prune(model, criterion, structures_for(criterion))
    changed = before.changed()
    before.check()
    assert changed == set(result.changed)
    assert bool(changed) == (criterion in ("obs", "kwon"))
    eager = trained("bert")
    again = prune(eager, criterion, structures_for(criterion))
    assert all(torch.equal(again.masks[name], mask) for name, mask in result.masks.items())
    assert all(torch.equal(tensor, eager.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_removal_with_compensation_is_closer_than_magnitude(kind: str) -> None:
    data = batches(8) if kind == "bert" else for_language(batches(8))
    errors = {}
    for criterion in ("l2", "wanda", "obs"):
        model = trained(kind)
        result = prune(model, criterion, {"heads": 0.5, "ffn": 0.5}, data, allocation="per_layer")
        errors[criterion] = logit_error(shrink(model, result.masks, verify=False), trained(kind), data)
    assert errors["obs"] < 0.7 * min(errors["l2"], errors["wanda"])


def by_layer(granularity: str) -> dict[str, str]:
    """Settings that leave every layer the same share, which a pattern does by itself."""
    return {"granularity": granularity} if granularity != "element" else {"allocation": "per_layer"}


@pytest.mark.parametrize("granularity", ["element", "2:4"])
def test_single_weights_with_compensation_are_closer_than_magnitude(granularity: str) -> None:
    data = for_language(batches(8))
    errors = {}
    for criterion in WEIGHT_CRITERIA:
        model = trained("llama")
        prune(model, criterion, {"weights": 0.5}, data, **by_layer(granularity))
        errors[criterion] = logit_error(model, trained("llama"), data)
    assert errors["obs"] < 0.8 * min(errors[name] for name in errors if name != "obs")
    assert errors["wanda"] < errors["level"] == errors["l1"] == errors["l2"]


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
@pytest.mark.parametrize(("granularity", "sparsity"), [("element", 0.3), ("2:4", 0.5), ("1:8", 0.875)])
def test_single_weights_are_zero_where_masked(criterion: str, granularity: str, sparsity: float) -> None:
    model = trained("bert")
    before = trained("bert").state_dict()
    result = prune(model, criterion, {"weights": sparsity}, **by_layer(granularity))
    assert result.masks == {}
    assert set(result.changed) == set(result.weight_masks)
    assert "classifier.weight" not in result.weight_masks
    for name, mask in result.weight_masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert int((~mask).sum()) == pytest.approx(sparsity * mask.numel(), abs=len(mask))
        if granularity != "element":
            kept, _, size = granularity.partition(":")
            assert bool((mask.view(len(mask), -1, int(size)).sum(-1) == int(kept)).all())
        if criterion != "obs":
            assert torch.equal(weight, before[name] * mask)


def test_magnitudes_of_all_layers_compete() -> None:
    model = trained("bert")
    result = prune(model, "level", {"weights": 0.5})
    masks = result.weight_masks
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total // 2
    dense = trained("bert").state_dict()
    lowest_kept = min(float(dense[name][mask].abs().min()) for name, mask in masks.items())
    assert lowest_kept >= max(float(dense[name][~mask].abs().max()) for name, mask in masks.items())


def test_conv1d_weights_are_pruned_along_their_inputs(gpt2: PreTrainedModel) -> None:
    ids = torch.arange(24).view(2, 12) % gpt2.config.vocab_size
    result = prune(gpt2, "obs", {"weights": 0.5}, [{"input_ids": ids}], granularity="2:4")
    for name, mask in result.weight_masks.items():
        assert torch.equal(gpt2.get_parameter(name) != 0, mask)
        assert bool((mask.T.reshape(mask.shape[1], -1, 4).sum(-1) == 2).all())


@pytest.fixture
def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_models.gpt2()


def permuted(model: PreTrainedModel, orders: dict[str, Tensor]) -> PreTrainedModel:
    """The same function with the units of its groups in another order."""
    result = copy.deepcopy(model)
    for group in dimension_groups(model):
        if group.name not in orders:
            continue
        for part in group.slices:
            tensor = result.get_parameter(part.parameter).data
            source = part.index[orders[group.name]].flatten()
            tensor.index_copy_(part.dim, part.index.flatten(), tensor.index_select(part.dim, source))
    return result


@pytest.mark.parametrize("criterion", [name for name in UNIT_CRITERIA if name not in ("block_influence", "random")])
def test_the_order_of_units_does_not_matter(criterion: str) -> None:
    model = trained("bert")
    groups = [group for group in dimension_groups(model) if group.kind in ("heads", "ffn")]
    orders = {group.name: torch.randperm(group.num_units) for group in groups}
    other = permuted(model, orders)
    data = batches(2)
    torch.testing.assert_close(oneshot_models.logits(other, data), oneshot_models.logits(model, data))
    masks = prune(model, criterion, {"heads": 0.5, "ffn": 0.5}).masks
    swapped = prune(other, criterion, {"heads": 0.5, "ffn": 0.5}).masks
    for name, mask in masks.items():
        assert torch.equal(swapped[name], mask[orders[name]])
    torch.testing.assert_close(other.state_dict(), permuted(model, orders).state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", ["wanda", "obs", "fisher", "kwon", "block_influence"])
def test_neither_batching_nor_padding_matters(criterion: str) -> None:
    (batch,) = batches(1, 12)
    pieces = [{key: value[i : i + 3] for key, value in batch.items()} for i in range(0, 12, 3)]
    longer = {
        key: torch.cat([value, value.new_full((12, 3), 0 if key == "attention_mask" else 7)], 1)
        for key, value in batch.items()
        if key != "labels"
    } | {"labels": batch["labels"]}
    found = []
    for data in ([batch], pieces, [longer]):
        model = trained("bert")
        result = prune(model, criterion, structures_for(criterion), data)
        found.append((result, model))
    (result, model), *others = found
    for other, changed in others:
        assert all(torch.equal(other.masks[name], mask) for name, mask in result.masks.items())
        torch.testing.assert_close(changed.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)


def test_layers_read_by_several_groups_do_not_bring_removed_units_back() -> None:
    model = trained("llama")
    wanted = {"heads": 0.5, "other": 0.5}
    result = prune(model, "obs", wanted, exclude=["lm_head"], allocation="per_layer")
    for group in dimension_groups(model):
        if group.name in result.masks:
            (reader,) = group.gates
            gone = group.gates[0].index[~result.masks[group.name]].flatten()
            assert len(gone) == 16
            assert not model.get_parameter(reader.parameter)[:, gone].any()
    shrink(model, result.masks)


@pytest.mark.parametrize("criterion", UNIT_CRITERIA)
def test_half_precision(criterion: str) -> None:
    model = trained("bert").bfloat16()
    result = prune(model, criterion, structures_for(criterion))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = prune(trained("bert"), criterion, structures_for(criterion)).masks
    same = [(mask == exact[name]).float().mean() for name, mask in result.masks.items()]
    assert float(torch.stack(same).mean()) > 0.85
    shrink(model, result.masks)


@pytest.mark.parametrize(
    ("name", "criterion", "kind"),
    [
        ("mixtral", "l2", "experts"),
        ("mixtral", "fisher", "ffn"),
        ("t5", "taylor", "layers"),
        ("bert", "l1", "hidden"),
    ],
)
def test_kinds_that_only_some_criteria_score(name: str, criterion: str, kind: str) -> None:
    torch.manual_seed(0)
    model = tiny_models.ZOO[name]()
    inputs = make_example_inputs(model)
    result = prune(model, criterion, {kind: 0.25}, [{**inputs, **make_labels(model, inputs)}])
    assert result.changed == ()
    assert shrink(model, result.masks).num_parameters() < model.num_parameters()


def test_tied_groups_keep_equal_shares() -> None:
    model = trained("llama")
    result = prune(model, "l2", {"head_dim": 0.5})
    shares = {float(mask.float().mean()) for mask in result.masks.values()}
    assert shares == {0.5}
    shrink(model, result.masks)


def test_generators_and_a_number_of_batches() -> None:
    data = batches(4)
    first = prune(trained("bert"), "obs", {"ffn": 0.5}, data[:2])
    second = prune(trained("bert"), "obs", {"ffn": 0.5}, (batch for batch in data), num_batches=2)
    whole = prune(trained("bert"), "obs", {"ffn": 0.5}, data)
    assert all(torch.equal(first.scores[name], scores) for name, scores in second.scores.items())
    assert not all(torch.equal(first.scores[name], scores) for name, scores in whole.scores.items())


def test_the_summary_counts_what_stays() -> None:
    result = prune(trained("bert"), "l2", {"ffn": 0.75}, allocation="per_layer")
    assert result.summary().splitlines() == [f"bert.encoder.layer.{i}.ffn: keeps 16 of 64" for i in range(2)]


KEEP = {"criterion": "level", "schedule": "one_shot", "begin": 0, "end": 1}


@pytest.mark.parametrize(
    ("sparsity", "settings"),
    [
        (0.5, {"allocation": "per_layer"}),
        (0.45, {"allocation": "per_layer"}),  # no whole number in any row
        (0.5, {"granularity": "2:4"}),
        (0.5, {"granularity": "column"}),
        (0.5, {"granularity": "block", "block_size": (4, 8), "max_layer_sparsity": 0.75}),
    ],
)
@pytest.mark.parametrize("criterion", ["level", "wanda", "obs"])
def test_training_keeps_zeros_only_with_a_callback(
    make_trainer: Any, criterion: str, sparsity: float, settings: Any
) -> None:
    config = PruningConfig(structures={"weights": sparsity}, criterion=criterion, **settings)
    data = [{name: values[i] for name, values in batch.items()} for batch in batches(2) for i in range(8)]
    left = {}
    for kept in (True, False):
        model = trained("bert")
        result = prune_oneshot(model, batches(2), config)
        callbacks = [PruningCallback(dataclasses.replace(config, **KEEP))] if kept else []
        make_trainer(model, data, callbacks, max_steps=4, warmup_steps=1, learning_rate=1e-2).train()
        weights = dict(model.named_parameters())
        left[kept] = [int((weights[name][~mask] == 0).sum()) for name, mask in result.weight_masks.items()]
        assert all(str(value) in result.summary() for value in KEEP.values())
    assert left[True] == [int((~mask).sum()) for mask in result.weight_masks.values()]
    assert sum(left[False]) < 0.1 * sum(left[True])


@pytest.mark.parametrize("criterion", ["taylor", "l2", "obs", "kwon"])
def test_a_budget_of_the_whole_model(criterion) -> None:
    model = tiny_models.bert()
    config = PruningConfig(structures=["heads", "ffn"], criterion=criterion, target_params=0.85)
    whole = model.num_parameters()
    small = shrink(model, prune_oneshot(model, batches(3), config).masks)
    assert 0.85 * whole - 1048 < small.num_parameters() <= 0.85 * whole
