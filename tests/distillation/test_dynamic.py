"""Pairs of layers chosen by cost, against trying all of them."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_compress import ConfigError, TrainingError
from hf_compress.distillation.dynamic import Choice, DynamicPairing, choose

COSTS = torch.tensor([[5.0, 1.0, 3.0], [2.0, 4.0, 6.0]])


def cheapest(costs: list[list[float]], ordered: bool) -> float:
    """The least total cost of one column for each row that has any, by trying all."""
    rows = [row for row in costs if min(row) < math.inf]
    totals = [
        sum(row[column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.product(range(len(costs[0])), repeat=len(rows))
        if not ordered or list(columns) == sorted(columns)
    ]
    return min(totals)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cost = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, math.inf])
    values = draw(st.lists(st.lists(cost, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    kept = draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))
    return torch.tensor(values), None if kept is None else torch.tensor(kept)


def check(costs: Tensor, kept: Tensor | None, by: Any, ordered: bool) -> None:
    choice = choose(costs, kept=kept, by=by, ordered=ordered)
    remaining = costs if kept is None else costs.masked_fill(~kept[:, None], math.inf)
    choosing = remaining if by == "student" else remaining.T
    chosen, choosers = (choice.teacher, choice.student) if by == "student" else (choice.student, choice.teacher)
    assert choosers.tolist() == list(range(len(choosing)))
    assert choice.used.tolist() == [min(row) < math.inf for row in choosing.tolist()]
    expected = cheapest(choosing.tolist(), ordered)
    assert choice.costs(costs).sum().item() == expected
    if expected < math.inf:
        used = chosen[choice.used].tolist()
        assert not ordered or used == sorted(used)
        assert choice.possible.all()


@settings(max_examples=300, deadline=None)
@given(problem=problems(), by=st.sampled_from(["student", "teacher"]), ordered=st.booleans())
def test_no_other_choice_costs_less(problem: tuple[Tensor, Tensor | None], by: str, ordered: bool) -> None:
    costs, kept = problem
    check(costs, kept, by, ordered)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (2, 2), (2, 3), (3, 2), (3, 1)])
def test_the_order_is_kept_at_the_least_cost_for_all_small_tables(rows: int, columns: int) -> None:
    for values in itertools.product([0.0, 1.0, 3.0, math.inf], repeat=rows * columns):
        check(torch.tensor(values).reshape(rows, columns), None, "student", True)


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_the_order_is_kept_at_the_least_cost_in_larger_tables(by: str) -> None:
    for seed in range(20):
        check(torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)).mul(64).round(), None, by, True)


def test_a_choice_by_hand() -> None:
    free, in_order = choose(COSTS), choose(COSTS, ordered=True)
    assert free.teacher.tolist() == [1, 0]
    assert in_order.teacher.tolist() == [1, 1]
    assert in_order.costs(COSTS).tolist() == [1.0, 4.0]
    by_teacher = choose(COSTS, by="teacher")
    assert by_teacher.student.tolist() == [1, 0, 0]
    assert by_teacher.teacher.tolist() == [0, 1, 2]
    pruned = choose(COSTS, kept=torch.tensor([False, True]), by="teacher", ordered=True)
    assert pruned.student.tolist() == [1, 1, 1]


def test_a_pruned_layer_costs_nothing_and_does_not_hold_up_the_others() -> None:
    costs = torch.tensor([[1.0, 9.0, 9.0], [9.0, 9.0, 0.0], [9.0, 1.0, 9.0]], requires_grad=True)
    choice = choose(costs, kept=torch.tensor([True, False, True]), ordered=True)
    chosen = choice.costs(costs)
    assert chosen.tolist() == [1.0, 0.0, 1.0]
    chosen.sum().backward()
    assert costs.grad is not None
    assert costs.grad.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("by", ["student", "teacher"])
@pytest.mark.parametrize("ordered", [False, True])
def test_nothing_is_left_to_learn_if_all_layers_are_pruned(by: Any, ordered: bool) -> None:
    costs = COSTS.clone().requires_grad_()
    chosen = choose(costs, kept=torch.zeros(2, dtype=torch.bool), by=by, ordered=ordered).costs(costs)
    assert chosen.tolist() == [0.0] * (2 if by == "student" else 3)
    chosen.sum().backward()
    assert costs.grad is not None
    assert not costs.grad.any()


def test_costs_of_each_example_are_gathered_with_their_gradients() -> None:
    costs = torch.rand(2, 3, 4, requires_grad=True)
    gathered = Choice(
        torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([True, False]), torch.tensor([True, True])
    ).costs(costs)
    torch.testing.assert_close(gathered, torch.stack([costs[0, 2], torch.zeros(4)]))
    gathered.sum().backward()
    expected = torch.zeros(2, 3, 4)
    expected[0, 2] = 1
    assert costs.grad is not None
    assert torch.equal(costs.grad, expected)


def test_infinite_and_undefined_costs_of_candidates_are_not_hidden() -> None:
    everything = torch.ones(2, 3, dtype=torch.bool)
    for value in (math.inf, math.nan):
        costs = torch.full((2, 3), value)
        for ordered in (False, True):
            assert not choose(costs, everything, ordered=ordered).costs(costs).isfinite().any()
    undefined = torch.full((2, 3), math.nan)
    assert choose(undefined).costs(undefined).isnan().all()


def test_a_choice_that_cannot_keep_the_order_costs_infinity_whatever_the_table_says() -> None:
    candidates = torch.tensor([[False, False, True], [True, False, False]])
    assert choose(COSTS, candidates).costs(COSTS).tolist() == [3.0, 2.0]
    assert choose(COSTS, candidates, ordered=True).costs(COSTS).sum().item() == math.inf


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        (DynamicPairing(), ["111", "111"]),
        (DynamicPairing(candidates="later"), ["111", "011"]),
        (DynamicPairing(candidates={-1: [0, -1]}), ["000", "101"]),
        (DynamicPairing(teacher_layers=(0, -1)), ["101", "101"]),
        (DynamicPairing(candidates="later", teacher_layers=(2, 0), by="teacher"), ["101", "001"]),
        (DynamicPairing(candidates={0: (1, 2), 1: (0, 1)}, ordered=True), ["011", "110"]),
    ],
)
def test_candidates(pairing: DynamicPairing, expected: list[str]) -> None:
    mask = pairing.candidate_mask(2, 3)
    assert ["".join(str(int(value)) for value in row) for row in mask.tolist()] == expected
    choice = pairing.choose(COSTS, mask)
    pairs = zip(choice.student.tolist(), choice.teacher.tolist(), choice.used.tolist(), strict=True)
    assert all(mask[student, teacher] for student, teacher, used in pairs if used)
    assert choice.used.any()


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), bits=st.integers(0, 2**16 - 1))
def test_candidates_are_refused_just_where_no_choice_keeps_the_order(rows: int, columns: int, bits: int) -> None:
    listed = {row: [column for column in range(columns) if bits >> (row * columns + column) & 1] for row in range(rows)}
    listed = {row: layers for row, layers in listed.items() if layers}
    if not listed:
        return
    possible = any(list(columns) == sorted(columns) for columns in itertools.product(*listed.values()))
    pairing = DynamicPairing(candidates=listed, ordered=True)
    if possible:
        assert pairing.candidate_mask(rows, columns).sum() == sum(map(len, listed.values()))
    else:
        with pytest.raises(ConfigError, match="Use ordered=False"):
            pairing.candidate_mask(rows, columns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": "latter"}, "closest match: 'later'"),
        ({"by": "techer"}, "closest match: 'teacher'"),
        ({"ordered": 1}, "ordered is 1"),
        ({"candidates": {0: [1]}, "teacher_layers": (1,)}, "leave teacher_layers out"),
        ({"teacher_layers": ()}, "teacher_layers is empty"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DynamicPairing(**settings)


@pytest.mark.parametrize(
    ("pairing", "num_student", "message"),
    [
        (DynamicPairing(candidates={0: []}), 2, r"candidates of student layer 0 are \[\]"),
        (DynamicPairing(candidates={0: "12"}), 2, "candidates of student layer 0 are '12'"),
        (DynamicPairing(candidates={0: 1}), 2, "candidates of student layer 0 are 1"),  # type: ignore[dict-item]
        (DynamicPairing(candidates={}), 2, "no layers are given"),
        (DynamicPairing(candidates={0: [3]}), 2, "the teacher has 3 layers, and no layer 3"),
        (DynamicPairing(candidates={2: [0]}), 2, "the student has 2 layers, and no layer 2"),
        (DynamicPairing(teacher_layers=(7,)), 2, "no layer 7"),
        (DynamicPairing(candidates="later"), 5, r"student layers \[3, 4\] have no candidate"),
        (DynamicPairing(candidates="later", teacher_layers=(0,)), 2, r"student layers \[1\] have no candidate"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(pairing: DynamicPairing, num_student: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pairing.candidate_mask(num_student, 3)


@pytest.mark.parametrize(
    ("costs", "candidates", "kept"),
    [
        (torch.zeros(3), None, None),
        (torch.zeros(0, 3), None, None),
        (COSTS, torch.ones(3, 2, dtype=torch.bool), None),
        (COSTS, torch.ones(2, 3), None),
        (COSTS, None, torch.ones(3, dtype=torch.bool)),
        (COSTS, None, torch.ones(2)),
    ],
)
def test_tables_that_do_not_fit_are_refused(costs: Tensor, candidates: Any, kept: Any) -> None:
    with pytest.raises(TrainingError, match="costs, candidates and kept are"):
        choose(costs, candidates, kept)


@pytest.mark.parametrize("by", ["student", "teacher"])
@pytest.mark.parametrize("ordered", [False, True])
def test_choosing_does_not_wait_for_the_device(by: Any, ordered: bool) -> None:
    """A fake tensor has no values, so whatever reads one raises."""
    with FakeTensorMode():
        costs, kept = torch.rand(4, 6, requires_grad=True), torch.ones(4, dtype=torch.bool)
        chosen = choose(costs, torch.ones(4, 6, dtype=torch.bool), kept, by=by, ordered=ordered).costs(costs)
        chosen.sum().backward()
        assert chosen.shape == (4 if by == "student" else 6,)
