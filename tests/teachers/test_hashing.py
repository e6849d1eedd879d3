"""Hashes of inputs: against the formula in plain Python, and what they must and must not depend on."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_batches import padded
from torch import Tensor

from hf_compress.teachers.hashing import combine, row_hashes

M = (1 << 64) - 1
TOKENS = st.lists(st.integers(0, 60), min_size=1, max_size=12)
ROWS = st.lists(TOKENS, min_size=1, max_size=5)


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M
    return x ^ (x >> 31)


def reference(values: list[int], label: str, shape: list[int]) -> list[int]:
    """The formula of the module's docstring with Python's own integers."""
    first = second = 0
    for position, value in enumerate(values):
        numbers = [splitmix(((4 * position + which + 1) * 0x9E3779B97F4A7C15) & M) for which in range(4)]
        a, b, c, d = numbers[0] | 1, numbers[1], numbers[2] | 1, numbers[3] | 1
        y = (value * a + b) & M
        y = ((y ^ (y >> 32)) * c) & M
        y ^= y >> 29
        first, second = (first + y) & M, (second + y * d) & M
    salt = hashlib.sha256(f"{label} {shape}".encode()).digest()
    salts = (int.from_bytes(salt[:8], "little"), int.from_bytes(salt[8:16], "little"))
    sums = [splitmix((each + more) & M) for each, more in zip((first, second), salts, strict=True)]
    return [each - (1 << 64) if each >> 63 else each for each in sums]


def hashed(rows: list[list[int]], extra: int = 0, side: str = "right", value: int = 0) -> Tensor:
    mask = padded([[1] * len(row) for row in rows], extra, side).bool()
    return row_hashes(padded(rows, extra, side, value), mask, "input_ids")


@given(ROWS)
def test_the_formula(rows: list[list[int]]) -> None:
    assert hashed(rows).tolist() == [reference(row, "input_ids", []) for row in rows]


def test_the_formula_without_a_mask() -> None:
    row = [5, -1, 0, 7, 2**40, -(2**63)]
    found = row_hashes(torch.tensor([row]).view(1, 2, 3), None, "ids")
    assert found.tolist() == [reference([each & M for each in row], "ids", [2, 3])]


def test_long_rows_begin_like_short_ones() -> None:
    row = list(range(1500))
    assert hashed([row[:3], row])[0].tolist() == reference(row[:3], "input_ids", [])
    assert hashed([row]).tolist() == [reference(row, "input_ids", [])]


@given(ROWS, st.integers(0, 5), st.sampled_from(["left", "right"]), st.integers(0, 60))
def test_padding_changes_nothing(rows: list[list[int]], extra: int, side: str, value: int) -> None:
    assert torch.equal(hashed(rows, extra, side, value), hashed(rows))


@given(ROWS, st.randoms(use_true_random=False))
def test_rows_know_nothing_of_each_other(rows: list[list[int]], order: object) -> None:
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.equal(hashed([rows[index] for index in shuffled]), hashed(rows)[shuffled])
    assert torch.equal(hashed(rows[:1]), hashed(rows)[:1])


@given(TOKENS, TOKENS)
def test_other_texts_have_other_hashes(one: list[int], other: list[int]) -> None:
    first, second = hashed([one, other])
    assert bool((first == second).any()) == (one == other)


@given(TOKENS, st.integers(0, 60))
def test_a_token_more_counts_even_if_it_is_zero(row: list[int], token: int) -> None:
    assert not (hashed([row]) == hashed([[*row, token]])).any()
    assert not (hashed([row]) == hashed([[token, *row]])).any()


def test_no_collisions_among_all_short_texts() -> None:
    ids = torch.cartesian_prod(*[torch.arange(20)] * 4)
    hashes = row_hashes(ids, torch.ones_like(ids, dtype=torch.bool), "input_ids")
    assert all(len(column.unique()) == len(ids) for column in hashes.T)


def test_no_collisions_among_flipped_signs() -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 14)
    for values in (signs, signs.double(), signs * 0, signs * torch.arange(14)):
        hashes = row_hashes(values, None, "pixel_values")
        distinct = len(values.contiguous().view(torch.int32).unique(dim=0))
        assert all(len(column.unique()) == distinct for column in hashes.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_known_by_their_bits(dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = values.clone()
    changed[1, 2, 3] = torch.nextafter(values[1, 2, 3].double(), values.new_tensor(9).double()).to(dtype)
    if dtype != torch.float64:
        changed[1, 2, 3] = torch.nextafter(values[1, 2, 3], values.new_tensor(9))
    same = (row_hashes(values, None, "pixel_values") == row_hashes(changed, None, "pixel_values")).all(1)
    assert same.tolist() == [True, False, True]
    mask = torch.ones(3, 5, dtype=torch.bool)
    same = (row_hashes(values, mask, "inputs_embeds") == row_hashes(changed, mask, "inputs_embeds")).all(1)
    assert same.tolist() == [True, False, True]


def test_what_is_no_token_counts_too() -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    plain = row_hashes(ids, everything, "input_ids")
    assert torch.equal(row_hashes(ids.int(), everything, "input_ids"), plain)
    assert not (row_hashes(ids, everything, "token_type_ids") == plain).any()
    assert not (row_hashes(ids.view(1, 2, 2), None, "input_ids") == row_hashes(ids, None, "input_ids")).any()
    hole = torch.tensor([[True, False, True, True]])
    short = torch.tensor([[3, 5, 6]])
    assert not (row_hashes(ids, hole, "input_ids") == row_hashes(short, everything[:, :3], "input_ids")).any()


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 3), st.sampled_from(["left", "right"]))
def test_padding_of_vectors(width: int, extra: int, side: str) -> None:
    vectors = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    ends = torch.full((2, extra, width), 7.0)
    if side == "left":
        vectors, mask = torch.stack([vectors[0], vectors[1].roll(1, 0)]), torch.stack([mask[0], mask[1].flip(0)])
    parts = (vectors, ends) if side == "right" else (ends, vectors)
    masks = (mask, torch.zeros(2, extra, dtype=torch.bool))
    longer = torch.cat(parts, 1), torch.cat(masks if side == "right" else masks[::-1], 1)
    assert torch.equal(row_hashes(*longer, "inputs_embeds"), row_hashes(vectors, mask, "inputs_embeds"))


def test_the_order_of_rows_of_an_example_counts() -> None:
    hashes = hashed([[1, 2], [3], [4, 5], [6]]).view(2, 2, 2)
    assert not (combine(hashes) == combine(hashes.flip(1))).any()
    assert torch.equal(combine(hashes)[1:], combine(hashes[1:]))


def test_nothing_but_padding_has_a_hash() -> None:
    empty = row_hashes(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.bool), "input_ids")
    none = row_hashes(torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool), "input_ids")
    assert torch.equal(empty, none)
    assert not (none[0] == hashed([[0]])[0]).any()
