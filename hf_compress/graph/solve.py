"""Solve for the attributes that must change when dimensions shrink."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from hf_compress.errors import ShrinkError
from hf_compress.graph.dims import Dim, atoms, find
from hf_compress.graph.integers import OPERATORS, Attribute, Expression, NumericUse, Operation, Relation, Size


def new_size(dim: Dim, kept: Mapping[Dim, int]) -> int:
    """Return the size of a dimension once atoms have shrunk to the given numbers of units."""
    dim = find(dim)
    if dim.form == "atom":
        return kept.get(dim, dim.size)
    sizes = [new_size(child, kept) for child in dim.children]
    if dim.form == "concat":
        return sum(sizes)
    total = 1
    for size in sizes:
        total *= size
    return total


def new_prefix(dim: Dim, length: int, kept: Mapping[Dim, int]) -> int | None:
    """Return what the first ``length`` positions become, or None where the border lies within shrinking units."""
    dim = find(dim)
    if length in (0, dim.size):
        return 0 if length == 0 else new_size(dim, kept)
    if dim.form == "concat":
        before = 0
        for child in dim.children:
            size = find(child).size
            if length <= size:
                part = new_prefix(child, length, kept)
                return None if part is None else before + part
            before += new_size(child, kept)
            length -= size
    if dim.form == "product":
        first = find(dim.children[0])
        stride = dim.size // first.size
        if length % stride == 0:
            outer = new_prefix(first, length // stride, kept)
            scale = new_size(dim, kept) // max(new_size(first, kept), 1)
            return None if outer is None else outer * scale
    return length if new_size(dim, kept) == dim.size else None


class Equations:
    """The relations of recorded forward passes, with dimensions that know their sizes.

    Args:
        relations: What the forward passes need of integers that become sizes.
        numeric_uses: Integers that must stay what they are.
        dim_of: Returns the term of a recorded tensor's dimension.
        current: Returns the value that an attribute has now.
    """

    def __init__(
        self,
        relations: Iterable[Relation],
        numeric_uses: Iterable[NumericUse],
        dim_of: Callable[[Relation | Size], Dim],
        current: Callable[[Attribute], int],
    ) -> None:
        self.dim_of = dim_of
        self._read = current
        self._current: dict[Attribute, int] = {}
        self._by_atom: dict[Dim, list[Relation | NumericUse]] = defaultdict(list)
        self._by_attribute: dict[Attribute, list[Relation | NumericUse]] = defaultdict(list)
        needs: list[Relation | NumericUse] = [*relations, *numeric_uses]
        for need in dict.fromkeys(needs):
            dims = [dim_of(size) for size in _sizes(need.expression)]
            if isinstance(need, Relation):
                dims.append(dim_of(need))
            for atom in dict.fromkeys(atom for dim in dims for atom in atoms(dim)):
                self._by_atom[atom].append(need)
            for attribute in dict.fromkeys(_attributes(need.expression)):
                self._by_attribute[attribute].append(need)

    def solve(self, kept: Mapping[Dim, int]) -> dict[Attribute, int]:
        """Return new values of the attributes that must change.

        Args:
            kept: New number of units by atom.

        Raises:
            ShrinkError: If no values make every relation hold.
        """
        return _Solution(self, {find(atom): count for atom, count in kept.items()}).run()

    def attributes(self) -> list[Attribute]:
        """Return the attributes that forward code was seen to read."""
        return [attribute for attribute, needs in self._by_attribute.items() if needs]

    def touching(self, atom: Dim) -> list["Relation | NumericUse"]:
        """Return what speaks of sizes that contain ``atom``."""
        return self._by_atom.get(find(atom), [])

    def using(self, attribute: Attribute) -> list["Relation | NumericUse"]:
        """Return what speaks of ``attribute``."""
        return self._by_attribute[attribute]

    def numeric_attributes(self) -> list[Attribute]:
        """Return the attributes that the forward code computes with as numbers."""
        return [a for a, needs in self._by_attribute.items() if any(isinstance(need, NumericUse) for need in needs)]

    def current(self, attribute: Attribute) -> int:
        """Return the value that an attribute has now."""
        if attribute not in self._current:
            self._current[attribute] = self._read(attribute)
        return self._current[attribute]

    def value(self, expression: Expression, values: Mapping[Attribute, int], kept: Mapping[Dim, int]) -> int | None:
        """Evaluate an expression; None where it divides by zero."""
        if isinstance(expression, Attribute):
            return values.get(expression, self.current(expression))
        if isinstance(expression, Size):
            return new_size(self.dim_of(expression), kept)
        if isinstance(expression, Operation):
            left, right = self.value(expression.left, values, kept), self.value(expression.right, values, kept)
            divides_by_zero = expression.name in ("floordiv", "mod") and right == 0
            if left is None or right is None or divides_by_zero:
                return None
            return OPERATORS[expression.name](left, right)
        return int(expression)

    def target(self, need: Relation | NumericUse, kept: Mapping[Dim, int]) -> int | None:
        """Return what the expression of ``need`` must give.

        Raises:
            ShrinkError: If a slice would have to begin or end within units that go.
        """
        if isinstance(need, NumericUse):
            return self.value(need.expression, {}, {})
        dim = self.dim_of(need)
        size = new_size(dim, kept) if need.prefix is None else new_prefix(dim, need.prefix, kept)
        if size is None:
            raise ShrinkError(
                f"{need.function} in {need.module or 'the model'} cuts a dimension within the units to be removed, so "
                "removing them would move what it reads. Exclude that group."
            )
        return size


class _Solution:
    """One set of new sizes: follows, from the relations that the sizes touch, which attributes must change."""

    def __init__(self, equations: Equations, kept: Mapping[Dim, int]) -> None:
        self.equations = equations
        self.kept = kept
        self.values: dict[Attribute, int] = {}
        self.reasons: dict[Attribute, Relation | NumericUse] = {}
        self.seen: dict[Relation | NumericUse, None] = {}
        self.later: list[Relation | NumericUse] = []

    def run(self) -> dict[Attribute, int]:
        self._follow(need for atom in self.kept for need in self.equations.touching(atom))
        while self.later:
            self._satisfy(self.later.pop(0))
        for need in self.seen:  # a value that was found late may break what held before
            self._check(need)
        return {name: value for name, value in self.values.items() if value != self.equations.current(name)}

    def _follow(self, needs: Iterable[Relation | NumericUse]) -> None:
        queue = list(needs)
        while queue:
            need = queue.pop(0)
            if need in self.seen:
                continue
            self.seen[need] = None
            if isinstance(need.expression, Attribute):
                queue += self._set(need.expression, self.equations.target(need, self.kept), need)
            else:
                self.later.append(need)

    def _set(self, attribute: Attribute, value: int | None, need: Relation | NumericUse) -> list[Relation | NumericUse]:
        """Give an attribute its value and return what has to be looked at because of that."""
        assert value is not None
        if attribute in self.values:
            if self.values[attribute] != value:
                raise self._clash(attribute, value, need)
            return []
        self.values[attribute], self.reasons[attribute] = value, need
        return self.equations.using(attribute) if value != self.equations.current(attribute) else []

    def _clash(self, attribute: Attribute, value: int, need: Relation | NumericUse) -> ShrinkError:
        texts = []
        for wanted, why in ((self.values[attribute], self.reasons[attribute]), (value, need)):
            kind = " as a number" if isinstance(why, NumericUse) else ""
            texts.append(f"{wanted} for {why.function}{kind} in {why.module or 'the model'}")
        return ShrinkError(
            f"attribute {attribute} would have to be {texts[0]} and {texts[1]}. Keep the same number of units in the "
            "groups that share it."
        )

    def _satisfy(self, need: Relation | NumericUse) -> None:
        target = self.equations.target(need, self.kept)
        if self._value(need) == target:
            return
        for attribute in dict.fromkeys(_attributes(need.expression)):
            self._follow(n for n in self.equations.using(attribute) if isinstance(n.expression, Attribute))
        if self._value(need) == target:
            return
        free = [a for a in dict.fromkeys(_attributes(need.expression)) if a not in self.values]
        if len(free) == 1 and target is not None:
            found = self._search(free[0], need, target)
            if found is not None:
                self._follow(self._set(free[0], found, need))
                return
        raise self._unsolvable(need, target)

    def _search(self, attribute: Attribute, need: Relation | NumericUse, target: int) -> int | None:
        """Try values of the one unknown: expressions are short and sizes are small numbers."""
        for value in range(1, 4 * abs(self.equations.current(attribute)) + 2):
            if self.equations.value(need.expression, {**self.values, attribute: value}, self.kept) == target:
                return value
        return None

    def _check(self, need: Relation | NumericUse) -> None:
        target = self.equations.target(need, self.kept)
        if self._value(need) != target:
            raise self._unsolvable(need, target)

    def _value(self, need: Relation | NumericUse) -> int | None:
        return self.equations.value(need.expression, self.values, self.kept)

    def _unsolvable(self, need: Relation | NumericUse, target: int | None) -> ShrinkError:
        where = need.module or "the model"
        if isinstance(need, NumericUse):
            return ShrinkError(
                f"{need.function} in {where} computes with the number {describe(need.expression)}, which would change "
                f"from {target} to {self._value(need)} with the sizes. Exclude that structure."
            )
        return ShrinkError(
            f"{need.function} in {where} uses a size that it computes as {describe(need.expression)}; after shrinking "
            f"that gives {self._value(need)}, but {target} is needed. This structure cannot shrink by itself here; "
            "exclude it, or keep the groups that share the size equal."
        )


def _attributes(expression: Expression) -> Iterator[Attribute]:
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Operation):
        yield from _attributes(expression.left)
        yield from _attributes(expression.right)


def _sizes(expression: Expression) -> Iterator[Size]:
    if isinstance(expression, Size):
        yield expression
    elif isinstance(expression, Operation):
        yield from _sizes(expression.left)
        yield from _sizes(expression.right)


SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def describe(expression: Expression) -> str:
    """Return an expression as readable text."""
    if isinstance(expression, Operation):
        return f"({describe(expression.left)} {SIGNS[expression.name]} {describe(expression.right)})"
    if isinstance(expression, Size):
        return f"a tensor's size({expression.dim})"
    return str(expression)
