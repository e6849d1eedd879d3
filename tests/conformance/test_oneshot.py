"""Pruning without training, on every architecture: whatever can be removed is, the small model is the masked one."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import slow_unless
from zoo import ZOO

from hf_compress import PruningConfig, TargetError, dimension_groups, make_example_inputs, prune_oneshot, shrink
from hf_compress.instruments.select import prunable_modules

FAST = ("bert", "gpt2", "phi3", "t5", "vit")

REFUSED = {
    "mixtral": "needs Linear or Conv1D layers",  # experts are parameters of one module
    "qwen3_moe": "needs Linear or Conv1D layers",
    "siglip": "is never called",  # PyTorch's attention takes its weights
}


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def prepared(name: str) -> tuple[Any, Any, list[Any]]:
    torch.manual_seed(0)
    model = ZOO[name]()
    example = ZOO[name].example_inputs(model)
    data = [example] if example is not None else [make_example_inputs(model, batch_size=3, seed=s) for s in (0, 1)]
    return model, example, data


@pytest.mark.parametrize("name", [slow_unless(name in FAST, name, name=name) for name in ZOO])
def test_units_go_and_others_make_up_for_them(name: str) -> None:
    model, example, data = prepared(name)
    groups = [group for group in dimension_groups(model, example) if group.kind in ("heads", "ffn")]
    kinds = {group.kind for group in groups if group.frozen is None}
    config = PruningConfig(
        criterion="obs",
        structures=dict.fromkeys(sorted(kinds), 0.5),
        exclude=[f"^{re.escape(group.name)}$" for group in groups if group.frozen is not None],
        allocation="per_layer" if any(group.tied_to for group in groups) else "global",
    )
    if name in REFUSED:
        with pytest.raises(TargetError, match=REFUSED[name]):
            prune_oneshot(model, data, config, example_inputs=example)
        return
    result = prune_oneshot(model, data, config, example_inputs=example)
    assert result.changed
    small = shrink(model, result.masks, example_inputs=example)  # compares the masked with the small model
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", [slow_unless(name in FAST, name, name=name) for name in ZOO])
@pytest.mark.filterwarnings("ignore:PruningConfig.structures. 'weights' does not reach:UserWarning")
def test_single_weights_go_and_others_make_up_for_them(name: str) -> None:
    model, example, data = prepared(name)
    config = PruningConfig(
        criterion="obs",
        structures={"weights": 0.5},
        granularity="2:4",
        exclude=[
            f"^{re.escape(each)}[.]weight$"
            for each, module in prunable_modules(model, dimension_groups(model, example).called)
            if is_convolution(module)
        ],
    )
    result = prune_oneshot(model, data, config, example_inputs=example)
    assert result.weight_masks
    for parameter, mask in result.weight_masks.items():
        assert not model.get_parameter(parameter)[~mask].any()
        assert int(mask.sum()) * 2 == mask.numel()
