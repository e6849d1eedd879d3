"""Costs computed from the recorded forward pass are those that the shrunk model really has."""

import pytest
import torch
from masked_models import random_masks
from torch import Tensor
from transformers import PreTrainedModel
from versions import needs_newer_transformers
from zoo import ZOO

from hf_compress import profile, shrink
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph

KINDS = ("heads", "ffn", "hidden", "head_dim", "experts", "other")
NAMES = ("bert", "gpt2", "llama", "phi3", "t5", "vit", "whisper", "wav2vec2", "swin", "clip")


def counted(model: PreTrainedModel, inputs: object) -> tuple[int, int]:
    measured = profile(model, inputs, latency=False)
    return measured.parameters, measured.flops


HEAD_DIM = needs_newer_transformers("it scales by a head size that is fixed, and shrink refuses to cut head_dim")


@pytest.mark.parametrize("name", [*NAMES, pytest.param("deberta_v2", marks=HEAD_DIM)])
def test_costs_are_those_of_the_shrunk_model(name: str) -> None:
    model = ZOO[name]().eval()
    inputs = make_example_inputs(model)
    graph = ModelGraph(model, inputs)
    assert (graph.costs.parameters({}), graph.costs.flops({})) == counted(model, inputs)
    groups = [group for group in graph.groups if group.kind in KINDS and group.frozen is None]
    masks = random_masks(groups, seed=0, lose=True)
    kept = {group: int(mask.sum()) for group, mask in masks.items()}
    small = shrink(model, masks, example_inputs=inputs)
    assert (graph.costs.parameters(kept), graph.costs.flops(kept)) == counted(small, inputs)
    assert graph.costs.parameters(kept) < graph.costs.parameters({})
    assert graph.costs.flops(kept) < graph.costs.flops({})


DEEP = ("bert", "gpt2", "t5", "bart")


def gone_from(graph: ModelGraph, masks: dict[str, Tensor]) -> set[str]:
    groups = [group for group in graph.groups if group.name in masks]
    return {
        layer for g in groups for layer, stays in zip(g.modules, masks[g.name], strict=bool(g.modules)) if not stays
    }


@pytest.mark.parametrize("kinds", [("layers",), ("layers", *KINDS)], ids=["layers", "all"])
@pytest.mark.parametrize("name", DEEP)
def test_what_goes_with_a_layer_is_counted_once(name: str, kinds: tuple[str, ...]) -> None:
    """The first layer goes: in T5 it has the position bias of all of them, which stays."""
    model = ZOO[name]().eval()
    inputs = make_example_inputs(model)
    graph = ModelGraph(model, inputs)
    groups = [group for group in graph.groups if group.kind in kinds and group.frozen is None]
    masks = random_masks(groups, seed=0, lose=True)
    for group in groups:
        if group.kind == "layers":
            masks[group.name] = torch.arange(group.num_units) > 0
    kept, gone = {group: int(mask.sum()) for group, mask in masks.items()}, gone_from(graph, masks)
    assert gone
    small = shrink(model, masks, example_inputs=inputs)
    assert (graph.costs.parameters(kept, gone), graph.costs.flops(kept, gone)) == counted(small, inputs)
