"""Seeing what modules are given and return."""

import pytest
import torch
from torch import Tensor, nn

from hf_compress.instruments.observe import SeenEnough, reading_changes, reading_inputs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.first(x))
        return self.last(self.second(input=x))


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules())


def test_inputs_are_read_before_modules_run() -> None:
    model, x, read = Model(), torch.ones(1, 2), []
    modules = {"first": model.first, "second": model.second}
    with reading_inputs(modules, lambda name, tensor: read.append((name, tensor))):
        result = model(x)
    assert [name for name, _ in read] == ["first", "first", "second"]
    assert read[0][1] is x and torch.equal(read[1][1], model.first(x))
    assert torch.equal(read[2][1], model.first(model.first(x)))
    assert torch.equal(result, model(x)) and len(read) == 3
    assert hooks(model) == 0


def test_a_pass_ends_when_all_calls_were_seen() -> None:
    model, read, ran = Model(), [], []
    model.second.register_forward_hook(lambda *args: ran.append("second"))
    calls = {"first": 2, "second": 1}
    modules = {"first": model.first, "second": model.second}
    with pytest.raises(SeenEnough), reading_inputs(modules, lambda name, tensor: read.append(name), calls):
        model(torch.ones(1, 2))
    assert read == ["first", "first", "second"] and ran == []
    assert calls == {"first": 2, "second": 1}
    assert hooks(model) == 1


def test_changes_are_read_of_hidden_states() -> None:
    class Layer(nn.Module):
        def forward(self, mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return mask, hidden * 2

    layer, read = Layer(), []
    mask, hidden = torch.ones(2, dtype=torch.bool), torch.ones(2, 3, 4)
    with reading_changes({"layer": layer}, lambda *seen: read.append(seen)):
        layer(mask, hidden=hidden)
    ((name, before, after),) = read
    assert name == "layer" and before is hidden and torch.equal(after, hidden * 2)
    assert hooks(layer) == 0


def test_hooks_go_also_after_an_error() -> None:
    model = Model()

    def fail(*seen: object) -> None:
        raise KeyError

    for reading in (reading_inputs, reading_changes):
        with pytest.raises(KeyError), reading({"first": model.first}, fail):
            model(torch.ones(1, 3, 2))
        assert hooks(model) == 0
