import pytest
import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel

from hf_compress import ConfigError, GraphError, dimension_groups, op_rule
from hf_compress.graph.dims import Dim
from hf_compress.graph.op_rules import OpCall
from hf_compress.registry import op_rules

torch.library.define("hfc_test::mystery", "(Tensor x) -> Tensor")
torch.library.define("hfc_test::known", "(Tensor x) -> Tensor")
torch.library.define("hfc_test::wrong", "(Tensor x) -> Tensor")
torch.library.define("hfc_test::broken", "(Tensor x) -> Tensor")
for _name in ("mystery", "known", "wrong", "broken"):
    torch.library.impl(f"hfc_test::{_name}", "CPU", lambda x: x * 2)


@op_rule("hfc_test::known")
def known(op: OpCall) -> list[Dim]:
    return op.tensor("x").dims


@op_rule("hfc_test::wrong")
def wrong(op: OpCall) -> list[Dim]:
    return op.tensor("x").dims[:-1]


class Net(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, op: str) -> None:
        super().__init__(BertConfig())
        self.up, self.down, self.op = nn.Linear(6, 10), nn.Linear(10, 4), getattr(torch.ops.hfc_test, op)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.op(self.up(x)))


def middle(op: str):
    groups = dimension_groups(Net(op), {"x": torch.randn(2, 6)})
    return [g for g in groups if g.num_units == 10]


def test_an_operator_without_a_rule_freezes_what_it_touches_and_is_named() -> None:
    groups = middle("mystery")
    assert len(groups) == 2  # the two sides are not known to be the same
    assert all("hfc_test::mystery has no op rule" in g.frozen for g in groups)


def test_a_users_rule_makes_it_prunable() -> None:
    (group,) = middle("known")
    assert group.frozen is None
    assert {(s.parameter, s.dim) for s in group.slices} == {("up.weight", 0), ("up.bias", 0), ("down.weight", 1)}


def test_a_rule_whose_result_does_not_fit_freezes() -> None:
    assert all("does not fit" in g.frozen or "do not fit" in g.frozen for g in middle("wrong"))


def test_a_rule_cannot_be_registered_twice() -> None:
    with pytest.raises(ConfigError, match="registered already"):
        op_rule("hfc_test::known")(known)
    assert op_rules.get("hfc_test::known") is known


@pytest.mark.parametrize("names", [("hfc_test.known",), ("known",), (3,), ()])
def test_names_of_another_form_are_refused(names) -> None:
    with pytest.raises(ConfigError, match='allowed: names such as "mylib::scale"'):
        op_rule(*names)
    with pytest.raises(ConfigError, match="allowed: a function of one OpCall"):
        op_rule("hfc_test::unused")(5)


BROKEN = {
    "raises": (lambda op: 1 / 0, "op rule of hfc_test::broken failed: ZeroDivisionError"),
    "no such tensor": (lambda op: op.tensor("y").dims, "asks for the tensor 'y'; allowed: 'x'"),
    "no such role": (lambda op: op.mark(op.tensor("x").dims[0], "hedas"), "'hedas'; closest match: 'heads'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_that_fails_is_named(case, monkeypatch) -> None:
    rule, message = BROKEN[case]
    monkeypatch.setitem(op_rules._entries, "hfc_test::broken", rule)
    with pytest.raises(GraphError, match=message):
        middle("broken")


@pytest.mark.parametrize("result", [[2, 10], "ab", None, 3, ([], [])])
def test_a_rule_that_returns_no_dimensions_freezes(result, monkeypatch) -> None:
    monkeypatch.setitem(op_rules._entries, "hfc_test::broken", lambda op: result)
    assert all("do not fit its result" in g.frozen for g in middle("broken"))
