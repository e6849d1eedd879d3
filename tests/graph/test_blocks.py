"""What is left of a block that lost all of its units."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.graph.blocks import EmptyBlock, cache_places, close_gaps, emptied_blocks, empty_block


class Attention(nn.Module):
    def __init__(self, layer: int, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.layer_idx = layer
        self.query = nn.Linear(6, 4)
        self.output = nn.Module()
        self.output.dense = projection or nn.Linear(0, 6)
        self.register_buffer("bias", torch.zeros(1))
        self.scale = nn.Parameter(torch.zeros(1))


class Model(nn.Module):
    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": Attention(i)}) for i in range(num_layers))
        self.other = Attention(9)


HIDDEN = torch.ones(2, 3, 6)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("length", [None, 1, 3])
def test_the_bias_of_the_output_projection_is_left(kind, length) -> None:
    projection: Any = nn.Linear(0, 6) if kind is nn.Linear else Conv1D(6, 0)
    projection.bias.data.copy_(torch.arange(6.0))
    module = Attention(0, projection)
    empty_block(module, "output.dense", length)
    assert type(module) is EmptyBlock and module.layer_idx == 0
    assert [name for name, _ in module.named_parameters()] == ["output.dense.weight", "output.dense.bias"]
    assert not list(module.buffers()) and module.get_submodule("output.dense") is projection
    result = module(None, hidden_states=HIDDEN)
    if length is not None:
        assert isinstance(result, tuple) and result[1:] == (None,) * (length - 1)
        result = result[0]
    assert torch.equal(result, torch.arange(6.0).expand(2, 3, 6))


def test_a_projection_outside_gets_nothing() -> None:
    module = Attention(0)
    empty_block(module, None, None)
    assert not list(module.children()) and not list(module.parameters())
    result = module(HIDDEN.double())
    assert result.shape == (2, 3, 0) and result.dtype == torch.float64


def test_emptied_blocks_are_listed_and_their_places_in_the_cache_closed() -> None:
    model = Model()
    assert emptied_blocks(model) == [] and cache_places(model) == []
    close_gaps(model)
    assert model.other.layer_idx == 9
    for layer, output in ((0, "output.dense"), (2, None)):
        empty_block(model.layers[layer].attention, output, 2)
    assert emptied_blocks(model) == [
        ("layers.0.attention", ("output.dense", 2)), ("layers.2.attention", (None, 2))
    ]  # fmt: skip
    places = cache_places(model)
    assert [(each.module, each.path) for each in places] == [
        ("layers.1.attention", ("layer_idx",)), ("layers.3.attention", ("layer_idx",))
    ]  # fmt: skip
    close_gaps(model)
    assert [model.layers[i].attention.layer_idx for i in (1, 3)] == [0, 1]
    assert model.other.layer_idx == 9


def test_modules_without_a_number_have_no_place() -> None:
    model = Model(3)
    model.layers[1].attention.layer_idx = None
    empty_block(model.layers[0].attention, None, None)
    assert [each.module for each in cache_places(model)] == ["layers.2.attention"]
