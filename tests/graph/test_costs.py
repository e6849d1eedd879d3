"""Costs computed from the recorded forward pass are those that the shrunk model really has."""

import pytest
from masked_models import random_masks
from transformers import PreTrainedModel
from zoo import ZOO

from hf_compress import profile, shrink
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import ModelGraph

KINDS = ("heads", "ffn", "hidden", "head_dim", "experts", "other")
NAMES = ("bert", "gpt2", "llama", "phi3", "t5", "vit", "whisper", "wav2vec2", "swin", "clip", "deberta_v2")


def counted(model: PreTrainedModel, inputs: object) -> tuple[int, int]:
    measured = profile(model, inputs, latency=False)
    return measured.parameters, measured.flops


@pytest.mark.parametrize("name", NAMES)
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
