"""Going back to earlier weights."""

import pytest
import torch
from torch import nn

from hf_compress import TrainingError
from hf_compress.instruments.rewind import Rewinder


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].bias.requires_grad = False
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rewinder: Rewinder | None, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        if rewinder is not None:
            rewinder.after(step)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if torch.equal(a[name], b[name])]


@pytest.mark.parametrize("moment", [0, 2])
def test_weights_go_back_and_the_optimizer_starts_anew(moment: int) -> None:
    model, optimizer = model_and_optimizer()
    rewinder = Rewinder(model, optimizer, moment, [4])
    train(model, optimizer, rewinder, range(1, moment + 1))
    then = copies(model)
    train(model, optimizer, rewinder, range(moment + 1, 4))
    assert same(copies(model), then) == ["2.bias"]
    train(model, optimizer, rewinder, range(4, 5))
    assert same(copies(model), then) == list(then)
    assert len(optimizer.state) == 0
    train(model, optimizer, rewinder, range(5, 6))

    fresh, again = model_and_optimizer()
    fresh.load_state_dict({**model.state_dict(), **then})
    train(fresh, again, None, range(5, 6))
    assert same(copies(model), copies(fresh)) == list(then)


def test_the_state_is_what_was_kept() -> None:
    model, optimizer = model_and_optimizer()
    first = Rewinder(model, optimizer, 1, [3])
    assert first.state() == {}
    train(model, optimizer, first, range(1, 3))
    state = first.state()
    assert {name.removeprefix("rewind.") for name in state} == set(copies(model)) - {"2.bias"}
    assert all(each.device.type == "cpu" for each in state.values())
    second = Rewinder(model, optimizer, 1, [3])
    second.restore(state, 2)
    train(model, optimizer, second, range(3, 4))
    now = copies(model)
    assert all(torch.equal(now[name.removeprefix("rewind.")], each) for name, each in state.items())


def test_a_state_of_other_parameters_is_refused() -> None:
    model, optimizer = model_and_optimizer()
    state = Rewinder(model, optimizer, 0, [3]).state()
    model[0].bias.requires_grad = False
    with pytest.raises(TrainingError, match=r"first difference: '0.bias'"):
        Rewinder(model, optimizer, 0, [3]).restore(state, 1)
    with pytest.raises(TrainingError, match="first difference"):
        Rewinder(model, optimizer, 1, [3]).restore({}, 1)


def test_an_optimizer_of_copies_is_refused() -> None:
    model, _ = model_and_optimizer()
    other, optimizer = model_and_optimizer()
    assert other is not model
    with pytest.raises(TrainingError, match="AdamW holds none of the model's own parameters"):
        Rewinder(model, optimizer, 0, [3])
