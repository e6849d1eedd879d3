"""What tells teachers apart when training resumes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from zoo import ALL

from hf_compress.callbacks import teacher
from hf_compress.callbacks.teacher import digest


def change(name: str, by: float = 1e-3) -> Callable[[Any], None]:
    def changed(model: Any) -> None:
        model.state_dict()[name].view(-1)[-1] += by

    return changed


def swap(model: Any) -> None:
    weight = model.state_dict()["bert.encoder.layer.1.output.dense.weight"]
    weight.copy_(weight.flip(0))


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "last value of a large weight": ("bert", change("bert.embeddings.word_embeddings.weight")),
    "order of rows": ("bert", swap),
    "config": ("bert", lambda model: setattr(model.config, "layer_norm_eps", 1e-3)),
    "dtype": ("bert", lambda model: model.to(torch.bfloat16)),
    "buffer": ("resnet", lambda model: [each.running_mean.add_(0.5) for each in batch_norms(model)]),
}


def batch_norms(model: nn.Module) -> list[Any]:
    found = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert found
    return found


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_PART", 1000)
    name, changed = CHANGES[case]
    model: PreTrainedModel = ALL[name]()
    before = digest(model)
    assert digest(ALL[name]()) == before
    with torch.no_grad():
        changed(model)
    assert digest(model) != before


def test_what_decides_nothing_is_left_out() -> None:
    model, named = ALL["bert"](), ALL["bert"]().eval()
    named.config.id2label = {0: "x", 1: "y", 2: "z"}
    named.config._name_or_path = "somewhere"
    assert digest(named) == digest(model)


def test_values_that_are_elsewhere_are_left_out() -> None:
    with torch.device("meta"):
        model = type(ALL["bert"]())(ALL["bert"]().config)
    assert digest(model) != digest(ALL["bert"]())
