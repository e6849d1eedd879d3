import json
import re

import pytest
import tiny_models
import torch
from torch import nn

from hf_compress import DimensionGroup, ParameterSlice, TargetError, dimension_groups
from hf_compress.graph.groups import DimensionGroups
from hf_compress.report.inspect import inspect_groups


def inspected(model, **kwargs):
    return inspect_groups(model, dimension_groups(model), **kwargs)


def group(name, *parts, frozen=None, kind="other") -> DimensionGroup:
    slices = tuple(ParameterSlice(parameter, dim, torch.tensor(index)) for parameter, dim, index in parts)
    units = len(slices[0].index)
    return DimensionGroup(kind=kind, name=name, num_units=units, slices=slices, gates=(), frozen=frozen)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4, 6))
        self.b = nn.Parameter(torch.zeros(10))


def names(model: nn.Module, groups: list[DimensionGroup]) -> list[str]:
    lines = inspect_groups(model, DimensionGroups(groups)).table().splitlines()[1:]
    return [line.split()[1] for line in lines]


def test_a_weight_in_two_dimensions_counts_once() -> None:
    rows, columns = group("rows", ("a", 0, [[0], [1]])), group("columns", ("a", 1, [[0, 3], [1, 4]]))
    found = inspect_groups(Plain(), DimensionGroups([rows, columns]))
    assert found.parameters == 34
    assert found.share([rows]) == pytest.approx(12 / 34)
    assert found.share([columns]) == pytest.approx(16 / 34)
    assert found.share([rows, columns]) == pytest.approx((24 - 2 * 2) / 34)  # all but 2 rows x 2 columns
    both = group("both", ("a", 0, [[0], [1]]), ("a", 1, [[0], [1]]))
    assert found.share([both]) == pytest.approx((24 - 2 * 4) / 34)


def test_prunable_weights_by_kind_leave_frozen_groups_out() -> None:
    groups = [
        group("x", ("a", 0, [[0], [1]]), kind="ffn"),
        group("y", ("a", 0, [[2], [3]]), kind="ffn", frozen="it is an input"),
        group("z", ("b", 0, [[0], [1]]), kind="heads"),
    ]
    found = inspect_groups(Plain(), DimensionGroups(groups))
    assert {kind: (c.groups, c.units, c.parameters) for kind, c in found.prunable().items()} == {
        "ffn": (1, 2, 12),
        "heads": (1, 2, 2),
        "all": (2, 4, 14),
    }
    assert "14 (41.2%) can be pruned (ffn 12 (35.3%) in 1 group; heads 2 (5.9%) in 1 group)" in found.summary()
    frozen = inspect_groups(Plain(), DimensionGroups(groups[1:2]), seconds=1.26)
    assert frozen.summary() == "Plain: 34 parameters, none can be pruned; analyzed in 1.3 s"


def test_a_real_model_counts_what_its_groups_own() -> None:
    model = tiny_models.bert()
    found = inspected(model)
    heads = [g for g in found.groups if g.kind == "heads"]
    assert found.prunable()["heads"].parameters == sum(g.num_units * g.parameters_per_unit for g in heads)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_layers_become_one_line_and_their_groups_are_all_in_the_json() -> None:
    found = inspected(tiny_models.bert())
    collapsed, full = found.table().splitlines(), found.table(collapse=False).splitlines()
    (line,) = [line for line in collapsed if line.startswith("ffn ")]
    assert re.split(r"  +", line)[1:4] == ["bert.encoder.layer.{0..1}.ffn", "2 x 44", str(2 * 32 + 1)]
    assert len([line for line in full if line.startswith("ffn ")]) == 2
    assert len(full) == len(found.groups) + 1
    assert len(json.loads(json.dumps(found.to_dict()))["groups"]) == len(found.groups)
    deberta = inspected(tiny_models.deberta_v2()).table().splitlines()
    (frozen,) = [line for line in deberta if "attention.self.head_dim" in line]
    assert frozen.endswith("would change from 8 to 7 with the sizes. Exclude that structure.")


def test_only_equal_groups_become_one_line() -> None:
    two, three = [[0], [1]], [[0], [1], [2]]
    groups = [
        group("m.layers.0.x", ("b", 0, two)),
        group("m.layers.1.x", ("b", 0, two)),
        group("m.layers.2.x", ("b", 0, three)),
        group("m.layers.3.x", ("b", 0, two)),
        group("m.layers.4.x", ("b", 0, two), frozen="softmax in m.layers.4 normalizes over it"),
        group("m.layers.5.x", ("b", 0, two), frozen="it is an input"),
        group("m.layers.6.x", ("b", 0, two), frozen="softmax in m.layers.6 normalizes over it"),
        group("m.layers.x", ("b", 0, two)),
    ]
    assert names(Plain(), groups) == [
        "m.layers.{0..1,3}.x",
        "m.layers.2.x",
        "m.layers.{4,6}.x",
        "m.layers.5.x",
        "m.layers.x",
    ]


def test_blocks_of_stages_become_one_line_where_the_stages_are_equal() -> None:
    parts = ("b", 0, [[0], [1]])
    equal = [group(f"m.{stage}.blocks.{block}.x", parts) for stage in range(2) for block in range(3)]
    assert names(Plain(), equal) == ["m.{0..1}.blocks.{0..2}.x"]
    assert names(Plain(), equal[:-1]) == ["m.{0..1}.blocks.{0..1}.x", "m.0.blocks.2.x"]


def test_kinds_are_chosen_by_name() -> None:
    found = inspected(tiny_models.bert(), kinds=["ffn", "vocab"])
    assert {g.kind for g in found.groups} == {"ffn", "vocab"}
    with pytest.raises(TargetError, match="no groups of kind 'fnn'; closest match: 'ffn'"):
        inspected(tiny_models.bert(), kinds=["fnn"])
