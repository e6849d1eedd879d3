import pytest
import torch

from hf_compress.graph.dims import (
    ConflictError,
    Dim,
    atoms,
    concat,
    expand,
    factors,
    find,
    product,
    segments,
    split_concat,
    split_product,
    take_factors,
    unify,
)


def positions(dim: Dim) -> dict[int, list[list[int]]]:
    """Sizes of atoms -> index; the test's atoms all have different sizes."""
    return {part.atom.size: part.index.tolist() for part in expand(dim)}


def test_expand_of_a_product_is_row_major() -> None:
    heads, inner = Dim(2), Dim(3)
    assert positions(product([heads, inner])) == {
        2: [[0, 1, 2], [3, 4, 5]],
        3: [[0, 3], [1, 4], [2, 5]],
    }


def test_expand_of_a_concatenation_offsets_each_part() -> None:
    assert positions(concat([Dim(2), Dim(3)])) == {2: [[0], [1]], 3: [[2], [3], [4]]}


def test_an_atom_in_several_segments_owns_a_position_in_each() -> None:
    """Fused query-key-value: three times the same heads."""
    heads, inner = Dim(2), Dim(4)
    fused = concat([product([heads, inner]) for _ in range(3)])
    assert positions(fused)[2][1] == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_unify_refines_both_sides_until_they_agree() -> None:
    coarse, fine = Dim(24), product([Dim(4), Dim(6)])
    split_product(coarse, 2)
    unify(coarse, fine)
    assert [d.size for d in factors(coarse)] == [2, 2, 6]
    assert [find(d) for d in factors(coarse)] == [find(d) for d in factors(fine)]


def test_unify_of_concatenations_cuts_at_common_borders() -> None:
    a, b = concat([Dim(5), Dim(3)]), concat([Dim(2), Dim(6)])
    unify(a, b)
    assert [d.size for d in segments(a)] == [2, 3, 3]
    assert [find(d) for d in segments(a)] == [find(d) for d in segments(b)]


@pytest.mark.parametrize("make", [product, concat])
def test_terms_with_the_same_parts_are_one_term(make) -> None:
    """Whoever asks for one of them again, such as a group that is frozen, finds what is known of the other."""
    a, b = make([Dim(4), Dim(6)]), make([Dim(4), Dim(6)])
    unify(a, b)
    assert find(a) is find(b)


def test_rotating_half_of_a_dimension_makes_its_halves_one() -> None:
    """Rotary embeddings: x + rotate_half(x) with x = (a, b) and rotate_half(x) = (-b, a)."""
    x = Dim(8)
    left, right = split_concat(x, [4, 4])
    unify(x, concat([right, left]))
    assert find(left) is find(right)
    assert positions(x) == {4: [[0, 4], [1, 5], [2, 6], [3, 7]]}


def test_repetition_of_key_heads_is_a_factor_of_query_heads() -> None:
    query, key = Dim(6), Dim(2)
    shared, repeated = split_product(query, 2)
    unify(shared, key)
    assert find(shared) is find(key)
    assert repeated.size == 3


def test_splitting_a_concatenation_of_equal_blocks_by_its_inner_size_unifies_the_blocks() -> None:
    dim = concat([Dim(3), Dim(5), Dim(3), Dim(5)])
    outer, inner = split_product(dim, 2)
    assert (outer.size, inner.size) == (2, 8)
    assert [d.size for d in segments(inner)] == [3, 5]


def test_take_factors_cuts_a_factor_where_the_border_falls_inside() -> None:
    outer, inner = take_factors([Dim(6), Dim(5)], 3)
    assert ([d.size for d in outer], [d.size for d in inner]) == ([3], [2, 5])


@pytest.mark.parametrize(
    "contradiction",
    [
        lambda: unify(Dim(3), Dim(4)),
        lambda: split_product(Dim(7), 2),
        lambda: split_concat(Dim(5), [2, 2]),
        lambda: split_concat(product([Dim(2), Dim(3)]), [1, 5]),
        lambda: take_factors([Dim(3)], 2),
    ],
)
def test_contradictions_are_conflicts(contradiction) -> None:
    with pytest.raises(ConflictError):
        contradiction()


def test_expand_covers_every_position_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 5, (4,), generator=generator).tolist()
        dim = concat([product([Dim(sizes[0]), Dim(sizes[1])]), Dim(sizes[2]), product([Dim(sizes[3]), Dim(2)])])
        for part in atoms(dim):
            assert part.form == "atom"
        covered = {}
        for part in expand(dim):
            assert part.index.shape[0] == part.atom.size
            for position in part.index.flatten().tolist():
                covered[position] = covered.get(position, 0) + 1
        # Positions of a product belong to one unit of each factor.
        assert set(covered) == set(range(dim.size)) or dim.size == 1


def sizes(dims: list[Dim]) -> list[int]:
    return [dim.size for dim in dims]


def test_splitting_a_concatenation_by_an_inner_size_that_divides_its_parts_splits_each() -> None:
    """(2 x 3) + (3 x 3) = (2 + 3) x 3."""
    dim = concat([Dim(6), Dim(9)])
    outer, inner = split_product(dim, 5)
    assert (sizes(segments(outer)), inner.size) == ([2, 3], 3)
    assert positions(dim)[2] == [[0, 1, 2], [3, 4, 5]]
    assert len(atoms(dim)) == 3 and find(factors(dim)[-1]) is find(inner)


def test_parts_of_one_unit_stay_parts_of_a_concatenation() -> None:
    dim = concat([Dim(3), Dim(6)])
    outer, inner = split_product(dim, 3)
    assert (sizes(segments(outer)), inner.size) == ([1, 2], 3)


def test_cuts_of_products_keep_the_inner_factors() -> None:
    heads, inner = Dim(6), Dim(4)
    first, second = split_concat(product([heads, inner]), [8, 16])
    assert (sizes(factors(first)), sizes(factors(second))) == ([2, 4], [4, 4])
    assert find(factors(first)[1]) is find(factors(second)[1]) is find(inner)
    assert sizes(segments(heads)) == [2, 4]


def test_cuts_of_concatenations_join_and_cut_their_parts() -> None:
    one, two, three = Dim(2), Dim(3), Dim(5)
    first, second = split_concat(concat([one, two, three]), [7, 3])
    assert (sizes(segments(first)), sizes(segments(second))) == ([2, 3, 2], [3])
    assert [find(part) for part in segments(three)] == [segments(first)[2], segments(second)[0]]


def test_a_product_that_is_a_concatenation_is_cut_where_that_is_joined() -> None:
    """Heads of queries and keys side by side: (2 + 4) heads of 3."""
    for flip in (False, True):
        heads, inner, query, key = Dim(6), Dim(3), Dim(6), Dim(12)
        pair = (product([heads, inner]), concat([query, key]))
        unify(*(pair[::-1] if flip else pair))
        assert sizes(segments(heads)) == [2, 4]
        assert [sizes(factors(part)) for part in (query, key)] == [[2, 3], [4, 3]]
        assert find(factors(query)[1]) is find(inner) is find(factors(key)[1])
    repeated = concat([Dim(2), Dim(3), Dim(2), Dim(3)])
    outer, block = Dim(2), Dim(5)
    unify(product([outer, block]), repeated)
    assert sizes(segments(block)) == [2, 3]


def test_sizes_of_one_say_nothing() -> None:
    five = Dim(5)
    assert product([Dim(1), five]) is five and product([]).size == product([Dim(1)]).size == 1
    assert concat([five]) is five and factors(Dim(1)) == []
    one, other = Dim(1), Dim(1)
    unify(one, other)
    assert find(one) is not find(other)
    assert [split_product(five, n)[i] is five for n, i in ((1, 1), (5, 0))] == [True, True]
    assert sizes(split_product(five, 1)) == [1, 5] and sizes(split_product(five, 5)) == [5, 1]  # type: ignore[arg-type]
    outer, inner = take_factors([Dim(1), Dim(4), five], 4)
    assert (sizes(outer), inner) == ([4], [five])


def test_products_are_cut_by_the_larger_factor_of_each_side() -> None:
    a, b = product([Dim(4), Dim(9)]), product([Dim(12), Dim(3)])
    unify(a, b)
    assert sizes(factors(a)) == sizes(factors(b)) == [4, 3, 3]
    assert [find(dim) for dim in factors(a)] == [find(dim) for dim in factors(b)]
    outer, inner = take_factors([product([Dim(2), Dim(3)]), Dim(5)], 2)
    assert (sizes(outer), sizes(inner)) == ([2], [3, 5])


def test_terms_are_shown_with_their_sizes() -> None:
    text = repr(product([Dim(2), concat([Dim(3), Dim(4)])]))
    assert "x" in text and "+" in text and text.startswith("(2@")
