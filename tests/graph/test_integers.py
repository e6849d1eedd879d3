import copy
import re

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, PreTrainedModel

from hf_compress import TargetError, dimension_groups, plan_shrink, shrink
from hf_compress.graph.capture import capture
from hf_compress.graph.dims import Dim, concat, product
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.integers import Attribute, Operation, TracedInt, read, write
from hf_compress.graph.solve import describe, new_prefix, new_size

A = Attribute("m", ("a",))


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_traced_integers_compute_like_integers(a, b) -> None:
    traced = TracedInt(a, A)
    assert (traced + b, traced - b, traced * b, b + traced, b - traced, b * traced, -traced) == (
        a + b, a - b, a * b, b + a, b - a, b * a, -a,
    )  # fmt: skip
    if b:
        assert (traced // b, traced % b) == (a // b, a % b)
    assert (hash(traced), traced == a, traced / 2) == (hash(a), True, a / 2)
    assert copy.deepcopy(traced) == a


def test_arithmetic_is_remembered_in_order() -> None:
    assert (TracedInt(6, A) // 2 + 1).expression == Operation("add", Operation("floordiv", A, 2), 1)
    assert describe((7 - TracedInt(6, A)).expression) == "(7 - m.a)"
    assert type(TracedInt(6, A) * 0.5) is float


def test_capture_leaves_attributes_and_configs_as_they_were() -> None:
    model = tiny_models.phi3()
    before = {name: (vars(m).get("config", None)) for name, m in model.named_modules()}
    capture(model, make_example_inputs(model))
    for name, module in model.named_modules():
        assert vars(module).get("config") is before[name]
        assert not any(isinstance(value, TracedInt) for value in vars(module).values())
    assert not any(isinstance(value, TracedInt) for value in vars(model.config).values())


def test_relations_name_the_attribute_and_where_it_is_used() -> None:
    model = tiny_models.opt()
    relations = capture(model, make_example_inputs(model)).relations
    heads = Attribute("model.decoder.layers.0.self_attn", ("num_heads",))
    found = [r for r in relations if r.expression == heads]
    assert found and all(r.module == heads.module and r.function == "a tensor shape" for r in found)


def test_sizes_of_terms_after_shrinking() -> None:
    heads, inner, rest = Dim(4), Dim(8), Dim(5)
    dim = concat([product([heads, inner]), rest])
    kept = {heads: 3, rest: 2}
    assert new_size(dim, kept) == 26
    assert [new_prefix(dim, n, kept) for n in (0, 32, 37)] == [0, 24, 26]
    assert new_prefix(dim, 16, kept) is None  # two heads of four: which ones went is not known here
    assert new_prefix(dim, 16, {rest: 2}) == 16


class Reader(PreTrainedModel):
    """Reads sizes in many ways: a tuple attribute, a product, a runtime size, constant borders."""

    config_class = BertConfig

    def __init__(self, how: str) -> None:
        super().__init__(BertConfig())
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)
        self.shape, self.half, self.how = (3, 4), 6, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        batch, width = hidden.shape
        if self.how == "tuple":
            hidden = hidden.view(batch, *self.shape).view(batch, -1)
        elif self.how == "product":
            hidden = hidden.reshape(batch, self.half * 2)
        elif self.how == "runtime":
            hidden = hidden.reshape(batch, width)
        elif self.how == "constant":
            hidden = torch.cat([hidden[:, :5], hidden[:, 5:]], dim=1)
        elif self.how == "number":
            hidden = hidden * width**-0.5
        elif self.how == "input":
            hidden = hidden.reshape(batch, x.shape[1] * 2)
        return self.down(hidden)


INPUTS = {"x": torch.randn(2, 6, generator=torch.Generator().manual_seed(0))}


def ffn(model, size):
    (group,) = [g for g in dimension_groups(model, INPUTS) if g.num_units == size and g.frozen is None]
    return group


def keep(size, kept):
    return torch.arange(size) < kept


@pytest.mark.parametrize(
    ("how", "size", "kept", "attribute", "value"),
    [("tuple", 3, 2, ("shape", 0), 2), ("tuple", 4, 3, ("shape", 1), 3), ("product", 12, 8, ("half",), 4)],
)
def test_attributes_are_solved_for(how, size, kept, attribute, value) -> None:
    model = Reader(how)
    group = ffn(model, size)
    small = shrink(model, {group.name: keep(size, kept)}, example_inputs=INPUTS)
    assert read(small, Attribute("", attribute)) == value
    assert model.shape == (3, 4) and model.half == 6


def test_runtime_sizes_need_nothing() -> None:
    model = Reader("runtime")
    plan = plan_shrink(model, {ffn(model, 12).name: keep(12, 5)}, example_inputs=INPUTS)
    assert plan.attributes == ()


@pytest.mark.parametrize(
    ("how", "size", "message"),
    [
        ("input", 12, r"\(a tensor's size\(1\) \* 2\); after shrinking that gives 12, but 11 is needed"),
        ("constant", 5, r"a slice in the model uses a size that it computes as 5"),
        ("number", 12, r"a power in the model computes with the number a tensor's size\(1\)"),
    ],
)
def test_sizes_that_cannot_follow_freeze_the_group_with_the_reason(how, size, message) -> None:
    model = Reader(how)
    (group,) = [g for g in dimension_groups(model, INPUTS) if g.num_units == size]
    assert re.search(message, group.frozen)
    with pytest.raises(TargetError, match="cannot lose units"):
        plan_shrink(model, {group.name: keep(size, size - 1)}, example_inputs=INPUTS)


def test_sizes_that_are_taken_in_parts_shrink_in_multiples() -> None:
    """Half of the size is an attribute: seven units need eight, one of them without effect."""
    model = Reader("product")
    group = ffn(model, 12)
    assert group.multiple_of == 2
    plan = plan_shrink(model, {group.name: keep(12, 7)}, example_inputs=INPUTS)
    assert plan.groups[group.name].kept == tuple(range(8)) and plan.groups[group.name].silenced == (7,)
    small = shrink(model, {group.name: keep(12, 7)}, example_inputs=INPUTS)
    assert small.half == 4 and small.down.weight[:, 7].count_nonzero() == 0


def test_writing_to_a_shared_config_gives_the_module_its_own() -> None:
    model = tiny_models.phi3()
    first, second = (layer.self_attn for layer in model.model.layers)
    write(model, Attribute("model.layers.0.self_attn", ("config", "num_attention_heads")), 2)
    assert first.config.num_attention_heads == 2
    assert second.config.num_attention_heads == model.config.num_attention_heads == 4


class Attending(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, **form) -> None:
        super().__init__(BertConfig())
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True, **form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return self.down(self.mix(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("form", [{"add_zero_attn": True}, {"add_bias_kv": True}, {"add_zero_attn": True, "kdim": 8}])
def test_forms_of_pytorchs_attention_that_insist_on_one_size_keep_it(form) -> None:
    """Input, projections and output; all of them are frozen, and the others can be removed."""
    inputs = {"x": torch.randn(2, 5, 6)}
    groups = dimension_groups(Attending(**form), inputs)
    of_the_size = [g for g in groups if any(s.parameter in ("up.weight", "down.weight") for s in g.slices)]
    assert len(of_the_size) == 4  # what goes in and comes out of the model, too
    assert all(group.frozen is not None for group in of_the_size)
    assert sum("multi_head_attention_forward" in (group.frozen or "") for group in groups) >= 3
    free = dimension_groups(Attending(), inputs)
    assert {group.num_units for group in free if group.frozen is None} == {2, 8}


def test_a_depthwise_convolution_has_as_many_groups_as_channels() -> None:
    class Net(PreTrainedModel):
        config_class = BertConfig

        def __init__(self) -> None:
            super().__init__(BertConfig())
            self.up, self.each, self.down = nn.Conv1d(3, 7, 1), nn.Conv1d(7, 7, 3, groups=7), nn.Conv1d(7, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.each(self.up(x)))

    relations = capture(Net(), {"x": torch.randn(2, 3, 9)}).relations
    found = [each for each in relations if each.function == "a depthwise convolution"]
    assert [(each.expression, each.dim) for each in found] == [(Attribute("each", ("groups",)), 1)]
    (group,) = [each for each in dimension_groups(Net(), {"x": torch.randn(2, 3, 9)}) if each.num_units == 7]
    assert group.frozen is None


class Uses(PreTrainedModel):
    """Does something with its integers."""

    config_class = BertConfig

    def __init__(self, use) -> None:
        super().__init__(BertConfig())
        self.two, self.three, self.use = 2, 3, use
        self.up = nn.Linear(5, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self, self.up(x))


def recorded(use):
    return capture(Uses(use), {"x": torch.randn(4, 5)})


@pytest.mark.parametrize(
    ("use", "function"),
    [
        (lambda m, x: x * m.two, "mul"),
        (lambda m, x: m.two - x, "rsub"),
        (lambda m, x: x / m.two, "div"),
        (lambda m, x: x**m.two, "pow"),
        (lambda m, x: x.add_(m.two), "add"),
        (lambda m, x: x % m.two, "remainder"),
        (lambda m, x: x * torch.tensor(m.two), "tensor"),
        (lambda m, x: x.masked_fill(x > 0, m.two), "masked_fill"),
        (lambda m, x: torch.fmod(input=x, other=m.two), "fmod"),
    ],
)
def test_integers_that_are_computed_with_are_noted(use, function) -> None:
    uses = recorded(use).numeric_uses
    assert (Attribute("", ("two",)), function) in {(each.expression, each.function) for each in uses}
    assert all(each.module == "" for each in uses)


THREE, TWO = Attribute("", ("three",)), Attribute("", ("two",))


@pytest.mark.parametrize(
    ("use", "function", "expected"),
    [
        (lambda m, x: x.view(4, m.three, -1), "a tensor shape", {(THREE, 1, None)}),
        (lambda m, x: x.reshape((4, -1, m.three)), "a tensor shape", {(THREE, 2, None)}),
        (lambda m, x: x + x.new_zeros(size=(m.two * 2, 12)), "a tensor shape", {(Operation("mul", TWO, 2), 0, None)}),
        (lambda m, x: x.split(m.three, dim=-1)[0], "split", {(THREE, 1, None)}),
        (lambda m, x: x.split(split_size=m.two)[1], "split", {(TWO, 0, None)}),
        (lambda m, x: x.split(5, 1)[0] + m.three, "split", set()),
        (lambda m, x: x.split([m.two, 10], dim=1)[1], "split", {(TWO, 1, None)}),
        (lambda m, x: nn.functional.layer_norm(x.view(4, 4, 3), (m.three,)), "a norm", {(THREE, 2, None)}),
        (lambda m, x: nn.functional.group_norm(x[:, :3], m.three), "a group norm", {(THREE, 1, None)}),
        (lambda m, x: nn.functional.group_norm(x, num_groups=m.three), "a group norm", set()),
        (lambda m, x: torch.histc(x, m.three), "histc", {(THREE, 0, None)}),
        (lambda m, x: nn.functional.one_hot(x.long() * 0, m.three), "one_hot", {(THREE, 2, None)}),
        (lambda m, x: nn.functional.one_hot(x.long() * 0, num_classes=m.two), "one_hot", {(TWO, 2, None)}),
        (lambda m, x: x[:, : m.three], "a slice", {(THREE, 1, 3)}),
        (lambda m, x: x[None, ..., m.two : -1 * m.three], "a slice", {(TWO, 1, 2), ("computed", 1, 9)}),
        (lambda m, x: x.view(2, 2, 12)[..., m.two :], "a slice", {(TWO, 2, 2)}),
        (lambda m, x: x[1 : m.three, 0], "a slice", {(THREE, 0, 3)}),
        (lambda m, x: x[:, : m.three + 9], "a slice", set()),
        (lambda m, x: x[:, m.two - 2 : m.two - 1], "a slice", {("computed", 1, 1)}),
    ],
)
def test_integers_that_become_sizes_are_related_to_them(use, function, expected) -> None:
    def known(expression):
        return expression if expression in (TWO, THREE, Operation("mul", TWO, 2)) else "computed"

    relations = [each for each in recorded(use).relations if each.function == function]
    found = {
        (known(each.expression), each.dim, each.prefix) for each in relations if not isinstance(each.expression, int)
    }
    assert found == expected


def test_other_convolutions_do_not_tie_their_channels_to_a_number() -> None:
    def convolve(m, x):
        return nn.functional.conv1d(x.view(4, 2, 6), x.new_ones(2, 2, 1))

    assert [each for each in recorded(convolve).relations if each.function == "a depthwise convolution"] == []


def test_chunks_keep_their_share() -> None:
    relations = [
        each for each in recorded(lambda m, x: x.chunk(m.three, dim=1)[0]).relations if each.function == "chunk"
    ]
    assert len(relations) == 3 and {each.dim for each in relations} == {1}
    assert {each.expression.name for each in relations} == {"floordiv"}
