"""Copies of a model that share its memory."""

import tiny_models
import torch
from masked_models import prunable

from hf_compress.graph.model import ModelGraph
from hf_compress.shrinking.apply import plain_copy, slice_in_place
from hf_compress.shrinking.plan import plan_on


def test_a_copy_can_share_weights_and_cutting_it_changes_nothing_here() -> None:
    model = tiny_models.bert_mlm()
    graph = ModelGraph(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    copy = plain_copy(model, share_weights=True)
    own = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        assert parameter is not own[name]
        assert parameter.data_ptr() == own[name].data_ptr()
        assert parameter.requires_grad == own[name].requires_grad
        assert parameter.grad is None
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    masks = {g.name: torch.arange(g.num_units) < 1 for g in prunable(graph.groups, "heads", "ffn")}
    slice_in_place(copy, plan_on(graph, masks))
    assert copy.num_parameters() < model.num_parameters()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_has_memory_of_its_own_by_default() -> None:
    model = tiny_models.bert()
    copy = plain_copy(model)
    own = dict(model.named_parameters())
    assert all(p.data_ptr() != own[name].data_ptr() for name, p in copy.named_parameters())
