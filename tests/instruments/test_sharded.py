"""Parameters and modules under FSDP version 2, sharded over two ranks, each a thread."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from thread_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_compress.instruments.sharded import (
    add_in_place,
    clamp,
    first_not_finite,
    is_sharded,
    reshard,
    scale,
    unsharded,
    whole,
    zero,
    zero_where,
)

VALUES = torch.arange(1.0, 13.0).view(4, 3)
MASK = VALUES % 2 == 0

CHANGES: dict[str, tuple[Callable[[Tensor], None], Tensor]] = {
    "zero rows": (lambda p: zero(p, 0, torch.tensor([0, 3])), VALUES * torch.tensor([[0.0], [1], [1], [0]])),
    "zero columns": (lambda p: zero(p, 1, torch.tensor([2])), VALUES * torch.tensor([1.0, 1, 0])),
    "zero where": (lambda p: zero_where(p, MASK), VALUES * ~MASK),
    "scale rows": (lambda p: scale(p, 0, torch.tensor([1, 2, 3, 4])), VALUES * torch.tensor([[1.0], [2], [3], [4]])),
    "scale columns": (lambda p: scale(p, 1, torch.tensor([2.0, 0, 1])), VALUES * torch.tensor([2.0, 0, 1])),
    "add": (lambda p: add_in_place(p, VALUES.double()), 2 * VALUES),
    "clamp": (lambda p: clamp(p, 3.0, 7.0), VALUES.clamp(3.0, 7.0)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_changes_in_place_are_those_of_the_whole_parameter(name, dim) -> None:
    change, expected = CHANGES[name]

    def changed(rank: int) -> Tensor:
        parameter = nn.Parameter(VALUES.clone())
        if dim is not None:
            mesh = init_device_mesh("cpu", (2,))
            parameter = nn.Parameter(distribute_tensor(VALUES.clone(), mesh, [Shard(dim)]))
            assert parameter.to_local().numel() < VALUES.numel()
        change(parameter)
        assert parameter.requires_grad
        found = whole(parameter.detach())
        assert not isinstance(found, DTensor)
        return found

    for found in on_ranks(changed):
        assert torch.equal(found, expected), found


def sharded_bert(*_: Any) -> Any:
    model = tiny_models.bert_mlm()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "get_input_embeddings")
    return model


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 15).view(2, 6)}


def test_a_plain_model_is_not_sharded() -> None:
    model = tiny_models.bert_mlm()
    assert not is_sharded(model)
    reshard(model)
    types, before = [type(each) for each in model.modules()], [dict(vars(each)) for each in model.modules()]
    with unsharded(model, weights=False):
        assert [type(each) for each in model.modules()] == types
        assert all(not parameter.is_meta for parameter in model.parameters())
    assert [dict(vars(each)) for each in model.modules()] == before


def test_gathered_copies_are_freed() -> None:
    def check(rank: int) -> list[bool]:
        model = sharded_bert()
        found = [is_sharded(model), is_sharded(model.bert), is_sharded(model.cls)]
        model.unshard()
        found.append(isinstance(model.cls.predictions.bias, DTensor))
        reshard(model)
        return [*found, isinstance(model.cls.predictions.bias, DTensor)]

    assert on_ranks(check) == [[True, True, False, False, True]] * 2


@pytest.mark.parametrize("weights", [True, False])
def test_a_sharded_model_is_the_plain_one_for_a_while(weights) -> None:
    plain = tiny_models.bert_mlm()
    expected = plain(**inputs()).logits.detach()

    def check(rank: int) -> Tensor | None:
        model, logits = sharded_bert(), None
        model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        known = [(each, type(each), vars(each), dict(vars(each))) for each in model.modules()]
        model.unshard()  # as evaluation leaves it
        with unsharded(model, weights=weights):
            assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
            assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
            assert not any(each._state_dict_pre_hooks or each._load_state_dict_pre_hooks for each in model.modules())
            assert "get_input_embeddings" not in vars(model)
            for (name, parameter), own in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert type(parameter) is nn.Parameter and parameter.shape == own.shape
                assert parameter.is_meta != weights
                assert parameter.requires_grad == (name != "bert.embeddings.word_embeddings.weight")
            model.made_meanwhile = True
            if weights:
                assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
                logits = model(**inputs()).logits.detach()
        for module, own, attributes, before in known:
            assert type(module) is own and vars(module) is attributes
            assert attributes.keys() == before.keys()
        assert isinstance(model, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert torch.equal(model(**inputs()).logits.detach(), expected)
        return logits

    for logits in on_ranks(check):
        assert torch.equal(logits, expected) if weights else logits is None


def test_a_hook_of_the_user_stays_while_those_of_fsdp_are_gone() -> None:
    def check(rank: int) -> tuple[int, int]:
        model, called = sharded_bert(), []
        layer = model.bert.encoder.layer[0]
        layer.register_forward_pre_hook(lambda module, args: called.append(rank))
        with unsharded(model, weights=True):
            model(**inputs())
            return len(called), len(layer._forward_pre_hooks)

    assert on_ranks(check) == [(1, 1)] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_parameter_that_is_not_finite_is_named_on_all_ranks(value) -> None:
    def check(rank: int) -> list[str | None]:
        model = sharded_bert()
        found = [first_not_finite(model)]
        bias = model.bert.encoder.layer[1].output.dense.bias
        if rank == 1:
            bias.detach().to_local()[-1] = value
        return [*found, first_not_finite(model)]

    assert on_ranks(check) == [[None, "bert.encoder.layer.1.output.dense.bias"]] * 2
    model = tiny_models.bert()
    assert first_not_finite(model) is None
    model.classifier.bias.data[0] = value
    assert first_not_finite(model) == "classifier.bias"
