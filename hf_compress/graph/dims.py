"""Dimension terms: what the positions along one tensor dimension mean, found by unification.

A dimension is an *atom* (a set of interchangeable units), a *product* of dimensions (row-major, as a reshape
makes: heads x head_dim) or a *concatenation* of dimensions (as cat makes: query + key + value). Operators say
which dimensions are the same; ``unify`` makes them so, refining both sides until they agree. Cost grows with the
number of operators, never with the sizes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


class ConflictError(Exception):
    """Two dimensions that must be the same cannot be cut into common parts. Callers freeze both."""


class Dim:
    """One dimension of one or many tensors.

    After ``unify`` several ``Dim`` objects stand for the same thing; ``find`` gives the one that represents them.
    """

    __slots__ = ("children", "form", "parent", "size")

    def __init__(
        self,
        size: int,
        form: Literal["atom", "product", "concat"] = "atom",
        children: tuple["Dim", ...] = (),
    ) -> None:
        self.size = int(size)
        self.form = form
        self.children = children
        self.parent: Dim | None = None

    def __repr__(self) -> str:
        dim = find(self)
        if dim.form == "atom":
            return f"{dim.size}@{id(dim) % 9973}"
        return "(" + (" x " if dim.form == "product" else " + ").join(map(repr, dim.children)) + ")"


def find(dim: Dim) -> Dim:
    """Return the dimension that represents ``dim`` now (union-find with path halving)."""
    while dim.parent is not None:
        if dim.parent.parent is not None:
            dim.parent = dim.parent.parent
        dim = dim.parent
    return dim


def product(dims: list[Dim]) -> Dim:
    """Return the row-major product; factors of size 1 say nothing and are left out."""
    dims = [dim for dim in dims if dim.size != 1]
    if not dims:
        return Dim(1)
    if len(dims) == 1:
        return dims[0]
    return Dim(math.prod(dim.size for dim in dims), "product", tuple(dims))


def concat(dims: list[Dim]) -> Dim:
    """Return the concatenation of ``dims``."""
    if len(dims) == 1:
        return dims[0]
    return Dim(sum(dim.size for dim in dims), "concat", tuple(dims))


def factors(dim: Dim) -> list[Dim]:
    """Return the finest known row-major factors, outermost first; size 1 has none."""
    dim = find(dim)
    if dim.size == 1:
        return []
    if dim.form == "product":
        return [factor for child in dim.children for factor in factors(child)]
    return [dim]


def segments(dim: Dim) -> list[Dim]:
    """Return the finest known segments of a concatenation, in order."""
    dim = find(dim)
    if dim.form == "concat":
        return [segment for child in dim.children for segment in segments(child)]
    return [dim]


def atoms(dim: Dim) -> list[Dim]:
    """Return every atom that ``dim`` is made of, each once, in order of appearance."""
    dim = find(dim)
    if dim.form == "atom":
        return [dim]
    return list(dict.fromkeys(atom for child in dim.children for atom in atoms(child)))


def split_product(dim: Dim, outer: int) -> tuple[Dim, Dim]:
    """Cut ``dim`` into a row-major product outer x inner and return both.

    Raises:
        ConflictError: If what is known about ``dim`` contradicts that cut.
    """
    dim = find(dim)
    inner, rest = divmod(dim.size, outer)
    if rest:
        raise ConflictError(f"{dim!r} is not {outer} x something")
    if outer == 1:
        return Dim(1), dim
    if inner == 1:
        return dim, Dim(1)
    if dim.form == "atom":
        dim.form, dim.children = "product", (Dim(outer), Dim(inner))
        return dim.children
    if dim.form == "product":
        left, right = take_factors(factors(dim), outer)
        return product(left), product(right)
    return _split_concat_as_product(dim, outer, inner)


def _split_concat_as_product(dim: Dim, outer: int, inner: int) -> tuple[Dim, Dim]:
    parts = segments(dim)
    if all(part.size % inner == 0 for part in parts):  # (a x i) + (b x i) = (a + b) x i
        pairs = [split_product(part, part.size // inner) for part in parts]
        for _, other in pairs[1:]:
            unify(pairs[0][1], other)
        outer_dim, inner_dim = concat([left if left.size > 1 else Dim(1) for left, _ in pairs]), pairs[0][1]
    else:  # the same concatenation repeated: n x (a + b)
        blocks = split_concat(dim, [inner] * outer)
        for block in blocks[1:]:
            unify(blocks[0], block)
        outer_dim, inner_dim = Dim(outer), blocks[0]
    dim = find(dim)
    if dim.form == "concat":
        dim.form, dim.children = "product", (outer_dim, inner_dim)
    return outer_dim, inner_dim


def take_factors(dims: list[Dim], size: int) -> tuple[list[Dim], list[Dim]]:
    """Split a row-major list of factors after the first ``size`` positions, cutting a factor where necessary.

    Returns:
        The outer factors, whose sizes multiply to ``size``, and the remaining inner ones.

    Raises:
        ConflictError: If no factor boundary or cut gives exactly ``size``.
    """
    outer: list[Dim] = []
    inner = list(dims)
    while size > 1:
        if not inner:
            raise ConflictError(f"factors end before {size}")
        head = find(inner[0])
        if head.size == 1:
            inner = inner[1:]
        elif size % head.size == 0:
            outer.append(head)
            size //= head.size
            inner = inner[1:]
        elif len(factors(head)) > 1:
            inner = factors(head) + inner[1:]
        elif (common := math.gcd(size, head.size)) > 1:
            left, right = split_product(head, common)
            outer.append(left)
            size //= common
            inner = [right, *inner[1:]]
        else:
            raise ConflictError(f"{head!r} has no common factor with {size}")
    return outer, inner


def split_concat(dim: Dim, sizes: list[int]) -> list[Dim]:
    """Cut ``dim`` into consecutive segments of the given sizes and return them.

    Raises:
        ConflictError: If a cut falls inside what is known to be one unit.
    """
    dim = find(dim)
    if sum(sizes) != dim.size:
        raise ConflictError(f"{dim!r} cannot be cut into {sizes}")
    if len(sizes) == 1:
        return [dim]
    if dim.form == "atom":
        dim.form, dim.children = "concat", tuple(Dim(size) for size in sizes)
        return list(dim.children)
    if dim.form == "product":
        first, *inner = factors(dim)
        stride = dim.size // first.size
        if all(size % stride == 0 for size in sizes):
            return [product([part, *inner]) for part in split_concat(first, [size // stride for size in sizes])]
        raise ConflictError(f"{dim!r} cannot be cut at {sizes}")
    return _split_segments(segments(dim), sizes)


def _split_segments(parts: list[Dim], sizes: list[int]) -> list[Dim]:
    result = []
    for size in sizes:
        taken: list[Dim] = []
        while size > 0:
            part = find(parts[0])
            if part.size <= size:
                taken.append(part)
                size -= part.size
                parts = parts[1:]
            else:
                left, right = split_concat(part, [size, part.size - size])
                taken.append(left)
                parts = [right, *parts[1:]]
                size = 0
        result.append(concat(taken))
    return result


def unify(a: Dim, b: Dim) -> None:
    """Make two dimensions the same, refining both as far as needed.

    Raises:
        ConflictError: If they cannot be the same.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise ConflictError(f"sizes differ: {a!r} and {b!r}")
    if a.size == 1:
        return
    if a.form == "atom":
        a.parent = b
    elif b.form == "atom":
        b.parent = a
    elif a.form == b.form:
        _unify_alike(a, b)
    elif a.form == "product":
        _unify_product_with_concat(a, b)
    else:
        _unify_product_with_concat(b, a)


def _unify_alike(a: Dim, b: Dim) -> None:
    """Walk two products (or two concatenations) in step and cut the larger part wherever the borders differ."""
    is_product = a.form == "product"
    parts = factors if is_product else segments
    left, right = parts(a), parts(b)
    while left and right:
        x, y = find(left[0]), find(right[0])
        if x.size == y.size:
            left, right = left[1:], right[1:]
            unify(x, y)
        elif x.size > y.size:
            head, tail = _cut(x, y.size, is_product)
            left, right = [*parts(tail), *left[1:]], right[1:]
            unify(head, y)
        else:
            head, tail = _cut(y, x.size, is_product)
            left, right = left[1:], [*parts(tail), *right[1:]]
            unify(x, head)
    a, b = find(a), find(b)
    if a is not b:
        a.parent = b


def _cut(dim: Dim, size: int, is_product: bool) -> tuple[Dim, Dim]:
    if is_product:
        return split_product(dim, size)
    left, right = split_concat(dim, [size, dim.size - size])
    return left, right


def _unify_product_with_concat(a: Dim, b: Dim) -> None:
    first, *inner = factors(a)
    stride = a.size // first.size
    parts = segments(b)
    if all(part.size % stride == 0 for part in parts):
        pieces = split_concat(first, [part.size // stride for part in parts])
        for piece, part in zip(pieces, parts, strict=True):
            unify(part, product([piece, *inner]))
        a, b = find(a), find(b)
        if a is not b:
            b.parent = a
        return
    split_product(b, first.size)
    if find(b).form != "product":
        raise ConflictError(f"{a!r} and {b!r}")
    unify(a, b)


@dataclass(frozen=True, eq=False)
class UnitPositions:
    """Where the units of an atom lie along a dimension."""

    atom: Dim
    index: Tensor
    """Long tensor [atom.size, k]: the k positions that each unit owns."""


def expand(dim: Dim) -> list[UnitPositions]:
    """Return, for every atom of ``dim``, the positions along ``dim`` that each of its units owns."""
    found: dict[Dim, list[Tensor]] = {}
    for atom, index in _expand(find(dim)):
        found.setdefault(atom, []).append(index)
    return [UnitPositions(atom, torch.cat(parts, dim=1)) for atom, parts in found.items()]


def _expand(dim: Dim) -> list[tuple[Dim, Tensor]]:
    if dim.form == "atom":
        return [(dim, torch.arange(dim.size).unsqueeze(1))]
    found = []
    offset, before = 0, 1
    for child in map(find, dim.children):
        if dim.form == "concat":
            found += [(atom, index + offset) for atom, index in _expand(child)]
            offset += child.size
            continue
        after = dim.size // (before * child.size)
        # A position of the product is (i_before * child.size + position) * after + i_after.
        grid = torch.arange(before).unsqueeze(1) * (child.size * after) + torch.arange(after)
        found += [
            (atom, (index.unsqueeze(2) * after + grid.view(1, 1, -1)).reshape(atom.size, -1))
            for atom, index in _expand(child)
        ]
        before *= child.size
    return found
