"""Kwon et al.'s pruning on a model: the budget is met, tuning helps, its scales are folded."""

from typing import Any

import pytest
import torch
from oneshot_models import batches, for_language, logit_error, prune, trained
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress import ConfigError, PruningConfig, TargetError, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.oneshot.prune import OneShotResult


def kwon(model: PreTrainedModel, structures: Any, data: Any = None, **options: Any) -> OneShotResult:
    config = PruningConfig(structures={"heads": 0.5})
    return prune(model, data or batches(4), config, structures=structures, criterion="kwon", options=options)


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_the_budget_is_met(share: float) -> None:
    model = trained("bert")
    result = kwon(model, ["heads", "ffn"], flops=share, tune=False)
    costs = ModelGraph(model).costs
    kept = {name: int(mask.sum()) for name, mask in result.masks.items()}
    one_unit = costs.flops({}) - costs.flops({"bert.encoder.layer.0.ffn": 63})
    assert share * costs.flops({}) - one_unit <= costs.flops(kept) <= share * costs.flops({})
    assert all(mask.any() for mask in result.masks.values())


def test_a_budget_below_everything_else_is_refused() -> None:
    with pytest.raises(TargetError, match="operations are in nothing that ffn could remove"):
        kwon(trained("bert"), ["ffn"], flops=0.1)
    costs = ModelGraph(trained("bert")).costs
    heads = {f"bert.encoder.layer.{i}.attention.heads": 2 for i in range(2)}
    half = 2 * costs.flops(heads) - costs.flops({})  # without any head
    with pytest.raises(TargetError, match="that every group must keep cost"):
        kwon(trained("bert"), ["heads"], flops=1.01 * half / costs.flops({}))


@pytest.mark.parametrize(
    ("structures", "options", "message"),
    [
        ({"heads": 0.5}, {"flops": 0.5}, "non-empty list"),
        (["heads"], {}, "non-empty mapping"),
        (["heads"], {"flops": 1.5}, "flops"),
        ({"heads": 0.5}, {"flop": 0.5}, "unknown key 'flop'"),
        ({"heads": 0.5}, {"tune": False, "damping": 0.1}, "damping"),
        ({"hidden": 0.5}, {}, "with criterion 'kwon'"),
    ],
)
def test_settings_that_do_not_go_together(structures: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kwon(trained("bert"), structures, **options)


def test_flops_and_another_allocation_do_not_go_together() -> None:
    config = PruningConfig(structures={"heads": 0.5}, allocation="per_layer")
    with pytest.raises(ConfigError, match="all units compete"):
        prune(trained("bert"), batches(1), config, structures=["ffn"], criterion="kwon", options={"flops": 0.5})


def test_tuning_brings_the_outputs_closer() -> None:
    data = for_language(batches(8))
    errors = {}
    for tune in (False, True):
        model = trained("llama")
        result = kwon(model, {"ffn": 0.75}, data, tune=tune)
        assert bool(result.changed) == tune
        errors[tune] = logit_error(shrink(model, result.masks, verify=False), trained("llama"), data)
    assert errors[True] < 0.9 * errors[False]


def test_tuning_brings_the_outputs_of_a_layer_closer() -> None:
    """The first layer that is pruned sees what it sees in the dense model."""
    data, name = batches(4), "bert.encoder.layer.0.output.dense"
    model, dense = trained("bert"), trained("bert")
    seen: list[Tensor] = []
    handle = dense.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in data:
        dense(**batch)
        seen[-1] = seen[-1][batch["attention_mask"].bool()].detach()
    handle.remove()
    mask = kwon(model, {"ffn": 0.5}, data).masks["bert.encoder.layer.0.ffn"]
    x, weight = torch.cat(seen), dense.get_submodule(name).weight.detach()
    tuned = model.get_submodule(name).weight.detach()
    assert (x @ (tuned - weight).T).norm() < 0.95 * (x @ (weight * mask - weight).T).norm()


def test_scales_are_folded_into_what_reads_the_units() -> None:
    model, dense = trained("bert"), trained("bert")
    result = kwon(model, {"ffn": 0.5})
    for name, mask in result.masks.items():
        parameter = name.replace(".ffn", ".output.dense.weight")
        assert parameter in result.changed
        ratio = model.get_parameter(parameter) / dense.get_parameter(parameter)
        torch.testing.assert_close(ratio, ratio.mean(0, keepdim=True).expand_as(ratio), rtol=1e-3, atol=1e-4)
        assert torch.equal(ratio[0] != 0, mask)
        assert bool((ratio.abs() < 10.001).all())
        assert not torch.allclose(ratio[0][mask], torch.ones(int(mask.sum())))


def test_rearranging_keeps_the_numbers() -> None:
    counts = [
        [int(mask.sum()) for mask in kwon(trained("bert"), {"ffn": 0.5}, rearrange=each, tune=False).masks.values()]
        for each in (False, True)
    ]
    assert counts[0] == counts[1]
