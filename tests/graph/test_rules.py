"""What the rules of operators say: which dimensions are one, which results have, which roles they get."""

from typing import Any

import pytest
from rule_calls import SIZES, Called, call, operand

from hf_compress.graph.dims import Dim, factors, find, segments
from hf_compress.graph.op_rules import OpCall, Operand
from hf_compress.registry import op_rules

Roles = set[tuple[str, str]]

# Operator, shapes of the results, arguments; results, letters of which all dimensions are one, roles.
Case = tuple[str, list[Any], dict[str, Any], list[str | None], str, Roles]

ACTIVATIONS = "contracted_activations"

CASES: dict[str, Case] = {
    "mm": ("aten::mm", ["ac"], {"self": "ab", "mat2": "bc"}, ["ac"], "b", {("b", ACTIVATIONS)}),
    "addmm": (
        "aten::addmm", ["ac"], {"self": "c", "mat1": "ab", "mat2": "bc"}, ["ac"], "bc", {("b", ACTIVATIONS)}
    ),
    "linear": (
        "aten::linear", ["abd"], {"input": "abc", "weight": "dc", "bias": "d"}, ["abd"], "cd", {("c", ACTIVATIONS)}
    ),
    "linear without bias": (
        "aten::linear", ["ad"], {"input": "ac", "weight": "dc", "bias": None}, ["ad"], "c", {("c", ACTIVATIONS)}
    ),
    "bmm": ("aten::bmm", ["abd"], {"self": "abc", "mat2": "acd"}, ["abd"], "ac", {("c", ACTIVATIONS)}),
    "baddbmm": (
        "aten::baddbmm", ["abd"], {"self": "bd", "batch1": "abc", "batch2": "acd"}, ["abd"], "abcd",
        {("c", ACTIVATIONS)},
    ),
    "grouped": (
        "aten::_grouped_mm", ["ad"], {"self": "ac", "mat2": "ecd", "offs": "e"}, ["ad"], "ce",
        {("c", ACTIVATIONS), ("e", "routed")},
    ),
    "mv": ("aten::mv", ["a"], {"self": "ab", "vec": "b"}, ["a"], "b", {("b", ACTIVATIONS)}),
    "dot": ("aten::dot", [""], {"self": "b", "tensor": "b"}, [""], "b", {("b", ACTIVATIONS)}),
    "outer": ("aten::outer", ["ab"], {"self": "a", "vec2": "b"}, ["ab"], "", set()),
    "layer norm": (
        "aten::native_layer_norm", ["abc", "ab1", "ab1"],
        {"input": "abc", "normalized_shape": [5], "weight": "c", "bias": "c"}, ["abc", "ab?", "ab?"], "c",
        {("c", "normalized")},
    ),
    "layer norm over two": (
        "aten::layer_norm", ["abc"], {"input": "abc", "normalized_shape": [3, 5], "weight": "bc", "bias": None},
        ["abc"], "bc", {("b", "normalized"), ("c", "normalized")},
    ),
    "fused norm": (
        "aten::_fused_rms_norm", ["abc", None, "a"],
        {"input": "abc", "normalized_shape": [5], "weight": None}, ["abc", None, "?"], "", {("c", "normalized")},
    ),
    "batch norm": (
        "aten::native_batch_norm", ["abcd", "b", None], {"input": "abcd", "weight": "b", "bias": "b", "mean": "b"},
        ["abcd", "?", None], "b", set(),
    ),
    "softmax": (
        "aten::_softmax", ["abcd"], {"self": "abcd", "dim": -1}, ["abcd"], "",
        {("d", "softmax"), ("a", "heads"), ("b", "heads")},
    ),
    "softmax of others": ("aten::_softmax", ["abc"], {"self": "abc", "dim": 1}, ["abc"], "", {("b", "softmax")}),
    "cumsum": ("aten::cumsum", ["abc"], {"self": "abc", "dim": -2}, ["abc"], "", {("b", "accumulated")}),
    "mean": ("aten::mean", ["ac"], {"self": "abc", "dim": [1]}, ["ac"], "", {("b", "averaged")}),
    "sum": ("aten::sum", ["a"], {"self": "abc", "dim": [-1, 1]}, ["a"], "", {("b", "reduced"), ("c", "reduced")}),
    "sum of all": ("aten::sum", [""], {"self": "ab"}, [""], "", {("a", "reduced"), ("b", "reduced")}),
    "sum of all, listed": (
        "aten::sum", [""], {"self": "ab", "dim": []}, [""], "", {("a", "reduced"), ("b", "reduced")}
    ),
    "sum of a number": ("aten::sum", [""], {"self": "", "dim": 0}, [""], "", set()),
    "sum of a vector": ("aten::sum", [""], {"self": "b", "dim": [-1]}, [""], "", {("b", "reduced")}),
    "softmax of a vector": ("aten::_softmax", ["b"], {"self": "b", "dim": -1}, ["b"], "", {("b", "softmax")}),
    "squeeze to nothing": ("aten::squeeze", [""], {"self": "1", "dim": -1}, [""], "", set()),
    "amax, kept": ("aten::amax", ["a1c"], {"self": "abc", "dim": 1}, ["a?c"], "", {("b", "reduced")}),
    "largest": ("aten::max", ["ac", "ac"], {"self": "abc", "dim": 1}, ["ac", "ac"], "", {("b", "reduced")}),
    "mean and variance": (
        "aten::var_mean", ["a", None], {"self": "ab", "dim": [1]}, ["a", None], "", {("b", "reduced")}
    ),
    "nll": (
        "aten::nll_loss_forward", ["", None], {"self": "ab", "target": "a"}, ["", None], "",
        {("a", "reduced"), ("b", "reduced")},
    ),
    "weight norm": (
        "aten::_weight_norm_interface", ["abc", "a11"], {"v": "abc", "g": "a11", "dim": 0}, ["abc", "a??"], "a",
        {("b", "reduced"), ("c", "reduced")},
    ),
    "clone": ("aten::clone", ["ab"], {"self": "ab"}, ["ab"], "", set()),
    "dropout": ("aten::native_dropout", ["ab", "ab"], {"input": "ab", "p": 0.1}, ["ab", "ab"], "", set()),
    "zeros like": ("aten::zeros_like", ["ab"], {"self": "ab"}, ["ab"], "", set()),
    "zeros": ("aten::zeros", ["ab"], {"size": (2, 3)}, ["??"], "", set()),
    "arange": ("aten::arange", ["b"], {"end": 3}, ["?"], "", {("?", "position_dependent")}),
    "copy": ("aten::copy", ["ab"], {"self": "ab", "src": "b"}, ["ab"], "b", set()),
    "transpose": ("aten::transpose", ["acb"], {"self": "abc", "dim0": 1, "dim1": -1}, ["acb"], "", set()),
    "t": ("aten::t", ["ba"], {"self": "ab"}, ["ba"], "", set()),
    "t of a vector": ("aten::t", ["a"], {"self": "a"}, ["a"], "", set()),
    "permute": ("aten::permute", ["cab"], {"self": "abc", "dims": (-1, 0, 1)}, ["cab"], "", set()),
    "unsqueeze": ("aten::unsqueeze", ["a1b"], {"self": "ab", "dim": 1}, ["a?b"], "", set()),
    "unsqueeze at the end": ("aten::unsqueeze", ["ab1"], {"self": "ab", "dim": -1}, ["ab?"], "", set()),
    "squeeze": ("aten::squeeze", ["ab"], {"self": "a1b1"}, ["ab"], "", set()),
    "squeeze one": ("aten::squeeze", ["ab1"], {"self": "a1b1", "dim": 1}, ["ab1"], "", set()),
    "squeeze several": ("aten::squeeze", ["ab"], {"self": "a1b1", "dim": (1, -1, 0)}, ["ab"], "", set()),
    "as strided": ("aten::as_strided", ["1ab"], {"self": "a1b"}, ["?ab"], "", set()),
    "as strided, unknown": (
        "aten::as_strided", ["ba"], {"self": "ab"}, ["??"], "",
        {("a", "opaque"), ("b", "opaque"), ("?", "opaque")},
    ),
    "expand": ("aten::expand", ["cab"], {"self": "1b", "size": (5, 2, 3)}, ["??b"], "", set()),
    "select": ("aten::select", ["ac"], {"self": "abc", "dim": -2, "index": 0}, ["ac"], "", {("b", "selected")}),
    "unbind": ("aten::unbind", ["b", "b"], {"self": "ab", "dim": 0}, ["b", "b"], "", {("a", "selected")}),
    "roll": ("aten::roll", ["ab"], {"self": "ab", "dims": (1,)}, ["ab"], "", {("b", "selected")}),
    "flip all": ("aten::roll", ["ab"], {"self": "ab", "dims": ()}, ["ab"], "", {("a", "selected"), ("b", "selected")}),
    "stack": ("aten::stack", ["aba"], {"tensors": ["ab", "ab"], "dim": -1}, ["ab?"], "ab", {("?", "selected")}),
    "hardswish": ("aten::hardswish", ["ab"], {"self": "ab"}, ["ab"], "", set()),
    "prelu": ("aten::_prelu_kernel", ["ab"], {"self": "ab", "weight": "1b"}, ["ab"], "b", set()),
    "embedding": (
        "aten::embedding", ["abd"], {"weight": "cd", "indices": "ab"}, ["abd"], "", {("c", "indexed")}
    ),
    "index select": (
        "aten::index_select", ["adc"], {"self": "abc", "dim": 1, "index": "d"}, ["adc"], "", {("b", "indexed")}
    ),
    "gather": (
        "aten::gather", ["ad"], {"self": "ab", "dim": -1, "index": "ad"}, ["ad"], "a", {("b", "indexed")}
    ),
    "scatter": (
        "aten::scatter", ["ab"], {"self": "ab", "dim": 1, "index": "ad", "src": "ad"}, ["ab"], "ad",
        {("b", "indexed")},
    ),
    "index add": (
        "aten::index_add", ["ab"], {"self": "ab", "dim": 0, "index": "c", "source": "cb"}, ["ab"], "b",
        {("a", "indexed")},
    ),
    "index put": (
        "aten::index_put", ["abc"], {"self": "abc", "indices": ["d"], "values": "dbc"}, ["abc"], "bc",
        {("a", "indexed")},
    ),
    "index": ("aten::index", ["dbc"], {"self": "abc", "indices": ["d"]}, ["dbc"], "", {("a", "indexed")}),
    "index in the middle": (
        "aten::index", ["ade"], {"self": "abc", "indices": [None, "de", "e"]}, ["ade"], "e",
        {("b", "indexed"), ("c", "indexed")},
    ),
    "index apart": (
        "aten::index", ["db"], {"self": "abc", "indices": ["d", None, "d"]}, ["db"], "d",
        {("a", "indexed"), ("c", "indexed")},
    ),
    "mask": (
        "aten::index", ["fc"], {"self": "abc", "indices": ["ab"]}, ["?c"], "ab", {("a", "selected"), ("b", "selected")}
    ),
    "nonzero": (
        "aten::nonzero", ["ca"], {"self": "ab"}, ["??"], "", {("a", "selected"), ("b", "selected")}
    ),
    "masked fill": ("aten::masked_fill", ["ab"], {"self": "ab", "mask": "1b"}, ["ab"], "b", set()),
    "where": ("aten::where", ["abc"], {"condition": "bc", "self": "a1c", "other": ""}, ["abc"], "c", set()),
    "item": ("aten::item", [None], {"self": ""}, [None], "", set()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule(name) -> None:
    operator, shapes, arguments, results, unified, roles = CASES[name]
    called = call(operator, *shapes, **arguments)
    assert called.result == results
    assert called.unified == set(unified)
    assert called.roles == roles


HEADS = {"query": "abcd", "key": "abed", "value": "abef"}


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("mask", ["attn_mask", "attn_bias"])
def test_attention(scale, mask) -> None:
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    called = call(name, "abcf", "abc", "ab", None, **HEADS, scale=scale, **{mask: "1bce"})
    assert called.result == ["abcf", "abc", "??", None]
    assert called.unified == set("abcde")
    numeric = {("d", "numeric")} if scale is None else set()
    of_heads = {("b", "heads"), ("d", "head_dim"), ("f", "head_dim"), ("e", "softmax"), ("d", ACTIVATIONS)}
    assert called.roles == of_heads | numeric
    alone = call("aten::scaled_dot_product_attention", "abcf", **HEADS)
    assert alone.result == ["abcf"] and alone.unified == set("abde")


def test_query_heads_are_repetitions_of_key_heads() -> None:
    called = call("aten::scaled_dot_product_attention", "agcf", query="agcd", key="abed", value="abef")
    (query,), keys = called.known["g"], called.known["b"]
    shared, repeated = factors(query)
    assert find(shared) is find(keys[0]) is find(keys[1])
    assert (shared.size, repeated.size) == (3, 4)
    assert called.result == ["agcf"]


def convolution(channels: str, weight: str, groups: int, result: tuple[int, ...], **changes: Any) -> Called:
    arguments = {"input": f"a{channels}cd", "weight": weight, "bias": weight[0], "transposed": False, "groups": groups}
    return call("aten::convolution", result, **{**arguments, **changes})


AROUND = {("c", "spatial"), ("d", "spatial"), ("?", "spatial"), ("h", "kernel")}


def test_convolutions() -> None:
    called = convolution("b", "ebhh", 1, (2, 11, 2, 4))
    assert called.result == ["ae??"] and called.unified == {"b", "e"}
    assert called.roles == AROUND | {("b", ACTIVATIONS)}
    other = convolution("b", "ebhh", 1, (2, 11, 2, 4), transposed=True)
    assert other.result == ["????"] and {role for _, role in other.roles} == {"opaque"}
    assert convolution("b", "ebhh", 1, (2, 11, 2, 4), bias=None).unified == {"b"}


def test_a_channel_of_a_depthwise_convolution_goes_with_its_filter() -> None:
    called = convolution("g", "g1hh", 12, (2, 12, 2, 4))
    assert called.result == ["ag??"] and "g" in called.unified
    assert called.roles == AROUND


def test_groups_of_a_convolution() -> None:
    called = convolution("g", "hbcc", 4, (2, 4, 2, 4))  # 12 channels in, 4 out, 4 groups of 3
    (channels,), (inner,) = called.known["g"], called.known["b"]
    group_in, own = factors(channels)
    assert (group_in.size, own.size) == (4, 3)
    assert find(group_in) is find(called.known["h"][0]) and find(own) is find(inner)
    marked = [find(mark.dim) for mark in called.op.marks if mark.role == "convolution_group"]
    assert marked == [find(group_in), find(own)]
    several = convolution("h", "gacc", 2, (2, 12, 2, 4))  # one filter for each of 6 outputs of 2 groups
    assert [dim.size for dim in factors(several.known["g"][0])] == [2, 6]
    assert {mark.role for mark in several.op.marks} >= {"convolution_group"}


def test_group_norm() -> None:
    called = call("aten::native_group_norm", "agcd", "ah", None, input="agcd", weight="g", bias="g", group=4)
    assert called.result == ["agcd", "??", None] and called.unified == {"g"}
    outer, inner = factors(called.known["g"][0])
    assert (outer.size, inner.size) == (4, 3)
    roles = [(find(mark.dim), mark.role) for mark in called.op.marks]
    assert roles[:2] == [(find(outer), "convolution_group"), (find(inner), "normalized")]
    assert {role for _, role in roles[2:]} == {"spatial"} and len(roles) == 4
    pairs = call("aten::native_group_norm", "ag", None, None, input="ag", weight=None, bias=None, group=6)
    assert [mark.role for mark in pairs.op.marks] == ["convolution_group", "normalized"]
    alone = call("aten::native_group_norm", "abc", None, None, input="abc", weight="b", bias=None, group=3)
    assert alone.roles == {("c", "spatial")} and alone.unified == {"b"}


def sizes(dims: list[Dim]) -> list[int]:
    return [dim.size for dim in dims]


def test_views_regroup_factors() -> None:
    called = call("aten::view", (6, 5, 3, 4), self="abcg")
    first, kept, outer, inner = called.results[0]  # type: ignore[misc]
    assert list(map(find, factors(first))) == [find(called.known[letter][0]) for letter in "ab"]
    assert find(kept) is find(called.known["c"][0])
    assert list(map(find, factors(called.known["g"][0]))) == [find(outer), find(inner)]
    assert called.roles == set()
    assert call("aten::view", "1ab1", self="ab").result == ["?ab?"]


def test_views_that_cut_at_odd_places_freeze_those_places_alone() -> None:
    called = call("aten::view", (5, 2, 7), self="cda")  # [5, 7, 2] -> [5, 2, 7]
    assert called.result == ["c??"]
    assert called.roles == {("d", "conflict"), ("a", "conflict"), ("?", "conflict")}


def test_views_of_nothing_keep_what_looks_the_same() -> None:
    assert call("aten::view", (0, 1, 3), self="0ab").result == ["0?b"]
    assert call("aten::view", (1, 0, 3), self="0b").result == ["?0b"]
    assert call("aten::view", (0, 3), self="a0b").result == ["0b"]


def test_ranges_along_a_dimension() -> None:
    def cut(letters: str, shape: tuple[int, ...], start: int | None, end: int | None, step: int = 1) -> Called:
        return call("aten::slice", shape, self=letters, dim=-1, start=start, end=end, step=step)

    assert cut("ab", (2, 3), None, None).result == ["ab"]
    assert cut("ab", (2, 0), 3, None).result == ["a?"]
    for start, end, place in ((0, 3, 0), (4, 12, 1), (None, 8, 0)):
        called = cut("ag", (2, (end or 12) - (start or 0)), start, end)
        parts = segments(called.known["g"][0])
        assert find(called.results[0][1]) is find(parts[place]) and len(parts) == 2  # type: ignore[index]
        assert called.roles == set()
    middle = cut("ag", (2, 4), 3, 7)
    parts = segments(middle.known["g"][0])
    assert sizes(parts) == [3, 4, 5] and find(middle.results[0][1]) is find(parts[1])  # type: ignore[index]
    stepped = cut("ag", (2, 4), 1, None, 3)
    outer, inner = factors(stepped.known["g"][0])
    assert (outer.size, inner.size) == (4, 3) and find(stepped.results[0][1]) is find(outer)  # type: ignore[index]
    assert [(find(mark.dim), mark.role) for mark in stepped.op.marks] == [(find(inner), "selected")]
    for odd in (cut("ag", (2, 3), 3, None, 3), cut("ad", (2, 3), 1, None, 2)):
        assert {role for _, role in odd.roles} == {"selected", "opaque"}


def test_a_range_that_cuts_a_unit_freezes_it() -> None:
    flat = Operand([Dim(12)])
    op_rules.get("aten::view")(OpCall("aten::view", "", {"self": flat}, [(3, 4)]))
    op = OpCall("aten::slice", "", {"self": flat, "dim": 0, "start": 0, "end": 6, "step": 1}, [(6,)])
    (cut,) = op_rules.get("aten::slice")(op)
    assert cut.size == 6
    assert [(mark.dim, mark.role) for mark in op.marks] == [(flat.dims[0], "conflict"), (cut, "conflict")]


def test_parts_and_joins() -> None:
    called = call("aten::split", (2, 4), (2, 4), (2, 4), self="ag", dim=-1)
    assert [each and each[0] for each in called.result] == ["a"] * 3
    parts = segments(called.known["g"][0])
    assert [find(result[1]) for result in called.results] == list(map(find, parts))  # type: ignore[index]
    joined = call("aten::cat", (2, 10), tensors=["ab", "ad", "a0"], dim=-1)
    assert joined.unified == {"a"} and joined.result[0][0] == "a"  # type: ignore[index]
    assert [joined.letter(part) for part in segments(joined.results[0][1])] == ["b", "d"]  # type: ignore[index]
    rows = call("aten::cat", (7, 3), tensors=["ab", "cb", "0"], dim=0)
    assert rows.unified == {"b"} and [rows.letter(part) for part in segments(rows.results[0][0])] == ["a", "c"]  # type: ignore[index]
    padded = call("aten::constant_pad_nd", (3, 3, 7), self="abc", pad=[2, 0, 0, 0, 0, 1])
    first, same, last = padded.results[0]  # type: ignore[misc]
    assert [padded.letter(part) for part in segments(first)] == ["a", "?"] and padded.letter(same) == "b"
    assert [padded.letter(part) for part in segments(last)] == ["?", "c"]
    assert {role for _, role in call("aten::constant_pad_nd", "aa", self="ab", pad=[0, -1]).roles} == {"opaque"}


def test_the_halves_of_a_gated_unit_are_one() -> None:
    called = call("aten::glu", (2, 6), self="ag", dim=-1)
    value, gate = segments(called.known["g"][0])
    assert find(value) is find(gate) is find(called.results[0][1])  # type: ignore[index]


def test_repetitions() -> None:
    called = call("aten::repeat", (4, 2, 9), self="ab", repeats=(4, 1, 3))
    new, same, tiled = called.results[0]  # type: ignore[misc]
    assert (called.letter(new), called.letter(same)) == ("?", "a")
    assert [called.letter(part) for part in factors(tiled)] == ["?", "b"]
    each = call("aten::repeat_interleave", (2, 9), self="ab", repeats=3, dim=-1)
    assert [each.letter(part) for part in factors(each.results[0][1])] == ["b", "?"]  # type: ignore[index]
    for unknown in ({"repeats": 3, "dim": None}, {"repeats": "b", "dim": 1}):
        assert {role for _, role in call("aten::repeat_interleave", (9,), self="ab", **unknown).roles} == {"opaque"}


def test_ranks_know_what_they_are_positions_of() -> None:
    called = call("aten::topk", "aa", "aa", self="ab", dim=-1, k=2)
    assert called.result == ["a?", "a?"]
    assert called.op.values == (None, called.known["b"][0])
    assert [(called.letter(mark.dim), mark.role, mark.amount) for mark in called.op.marks] == [("b", "ranked", 2)]
    ordered = call("aten::sort", "ab", "ab", self="ab")
    assert ordered.result == ["a?", "a?"]
    assert [(mark.role, mark.amount) for mark in ordered.op.marks] == [("ranked", 1)]
    largest = call("aten::argmax", "a", self="ab", dim=1)
    assert largest.op.values == (largest.known["b"][0],) and largest.result == ["a"]
    assert call("aten::argmax", "", self="ab").op.values == ()
    assert call("aten::amax", "a", self="ab", dim=1).op.values == ()


def test_numbers_of_units_look_up_those_units() -> None:
    experts = Dim(SIZES["c"])
    for values, role in ((experts, "routed"), (Dim(SIZES["b"]), "indexed"), (None, "indexed")):
        called = call("aten::embedding", "ad", weight="cd", indices=operand("a", values=values))
        assert called.roles == {("c", role)}
        assert (find(called.known["c"][0]) is find(experts)) == (role == "routed")
    counted = call("aten::bincount", "c", self=operand("a", values=experts))
    assert find(counted.results[0][0]) is find(experts)  # type: ignore[index]
    for unknown in (operand("a"), operand("a", values=Dim(3))):
        assert {mark.role for mark in call("aten::bincount", "c", self=unknown).op.marks} == {"opaque"}


@pytest.mark.parametrize(
    ("name", "shapes", "arguments", "expected"),
    [
        ("aten::t", ["ba"], {}, (1, 0)),
        ("aten::detach", ["ab"], {}, (0, 1)),
        ("aten::unsqueeze", ["a1b"], {"dim": 1}, (0, None, 1)),
        ("aten::expand", ["cab"], {}, (None, 0, 1)),
        ("aten::slice", ["a1"], {"dim": 1, "start": 0, "end": 1, "step": 1}, (0, None)),
        ("aten::split", ["a1", "aa"], {"dim": 1}, (0, None)),
        ("aten::index", ["deb"], {"indices": ["de"]}, (None, None, 1)),
        ("aten::index", ["ad"], {"indices": [None, "d"]}, None),
    ],
)
def test_what_is_left_of_a_parameter(name, shapes, arguments, expected) -> None:
    for source in ("weight", None):
        called = call(name, *shapes, self=operand("ab", source), **arguments)
        assert called.op.source == (None if expected is None or source is None else ("weight", expected))


def test_who_consumes_a_parameter() -> None:
    def consumed(x: Operand, weight: Operand) -> Called:
        return call("aten::linear", "abd", input=x, weight=weight, bias=None)

    one = consumed(operand("abc"), operand("dc", "weight"))
    (consumer,) = one.op.consumers
    assert (consumer.parameter, consumer.dim, consumer.module) == ("weight", 1, "module")
    assert [mark.role for mark in one.op.marks] == ["contracted"]
    for x, weight in ((operand("abc"), operand("dc")), (operand("abc", "table"), operand("dc", "weight"))):
        both = consumed(x, weight)
        assert both.op.consumers == [] and [mark.role for mark in both.op.marks] == [ACTIVATIONS]
    turned = call("aten::mm", "ac", self=operand("ab", "weight"), mat2="bc")
    assert [(each.parameter, each.dim) for each in turned.op.consumers] == [("weight", 1)]


@pytest.mark.parametrize("shapes", [("abc", "cde"), ("ac", "cde"), ("ac", "e")])
def test_experts_in_other_forms_are_not_understood(shapes) -> None:
    offsets = {"offs": "c"} if len(shapes[0]) == 3 or len(shapes[1]) == 1 else {}
    called = call("aten::_grouped_mm", "ae", self=shapes[0], mat2=shapes[1], **offsets)
    assert {role for _, role in called.roles} == {"opaque"}
