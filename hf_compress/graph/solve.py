"""Solve for the attributes that must change when dimensions shrink."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from hf_compress.errors import ShrinkError
from hf_compress.graph.dims import Dim, find
from hf_compress.graph.integers import OPERATORS, Attribute, Expression, Operation, Relation, Size


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
    """The relations of a recorded forward pass, with dimensions that know their new sizes.

    Args:
        relations: What the recorded forward pass needs.
        dims: Returns the term of a recorded tensor's dimension.
        current: Returns the value that an attribute has now.
        kept: New number of units by atom.
    """

    def __init__(
        self,
        relations: Iterable[Relation],
        dims: Callable[[Relation | Size], Dim],
        current: Callable[[Attribute], int],
        kept: Mapping[Dim, int],
    ) -> None:
        self.relations = list(relations)
        self.dims = dims
        self.current = current
        self.kept = kept
        self.values: dict[Attribute, int] = {}
        self.bound: dict[Attribute, Relation] = {}

    def solve(self) -> dict[Attribute, int]:
        """Return new values of the attributes that must change.

        Raises:
            ShrinkError: If no values make every relation hold.
        """
        for relation in self.relations:
            if isinstance(relation.expression, Attribute):
                self._bind(relation.expression, relation)
        for relation in self.relations:
            if not isinstance(relation.expression, Attribute):
                self._satisfy(relation)
        return {name: value for name, value in self.values.items() if value != self.current(name)}

    def _target(self, relation: Relation) -> int:
        dim = self.dims(relation)
        size = new_size(dim, self.kept) if relation.prefix is None else new_prefix(dim, relation.prefix, self.kept)
        if size is None:
            raise ShrinkError(
                f"{relation.function} in {relation.module or 'the model'} cuts a dimension within the units to be "
                "removed, so removing them would move what it reads. Exclude that group."
            )
        return size

    def _bind(self, attribute: Attribute, relation: Relation) -> None:
        target = self._target(relation)
        if self.values.setdefault(attribute, target) != target:
            raise ShrinkError(
                f"attribute {attribute} would have to be {self.values[attribute]} for {self.bound[attribute].function} "
                f"and {target} for {relation.function} in {relation.module or 'the model'}. Keep the same number of "
                "units in the groups that share it."
            )
        self.bound.setdefault(attribute, relation)

    def _satisfy(self, relation: Relation) -> None:
        target = self._target(relation)
        if self._evaluate(relation.expression) == target:
            return
        free = [a for a in dict.fromkeys(_attributes(relation.expression)) if a not in self.bound]
        if len(free) == 1 and self._search(free[0], relation, target):
            self.bound[free[0]] = relation
            return
        raise ShrinkError(
            f"{relation.function} in {relation.module or 'the model'} uses a size that it computes as "
            f"{describe(relation.expression)}; after shrinking that gives {self._evaluate(relation.expression)}, but "
            f"{target} is needed. This structure cannot shrink by itself here; exclude it, or keep the groups that "
            "share the size equal."
        )

    def _search(self, attribute: Attribute, relation: Relation, target: int) -> bool:
        """Try values of the one unknown: expressions are short and sizes are small numbers."""
        old = self.values.get(attribute, self.current(attribute))
        for value in range(1, 4 * abs(old) + 2):
            self.values[attribute] = value
            if self._evaluate(relation.expression) == target:
                return True
        self.values.pop(attribute)
        return False

    def _evaluate(self, expression: Expression) -> int | None:
        if isinstance(expression, Attribute):
            return self.values.get(expression, self.current(expression))
        if isinstance(expression, Size):
            return new_size(self.dims(expression), self.kept)
        if isinstance(expression, Operation):
            left, right = self._evaluate(expression.left), self._evaluate(expression.right)
            divides_by_zero = expression.name in ("floordiv", "mod") and right == 0
            if left is None or right is None or divides_by_zero:
                return None
            return OPERATORS[expression.name](left, right)
        return int(expression)


def _attributes(expression: Expression) -> Iterator[Attribute]:
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Operation):
        yield from _attributes(expression.left)
        yield from _attributes(expression.right)


SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def describe(expression: Expression) -> str:
    """Return an expression as readable text."""
    if isinstance(expression, Operation):
        return f"({describe(expression.left)} {SIGNS[expression.name]} {describe(expression.right)})"
    if isinstance(expression, Size):
        return f"a tensor's size({expression.dim})"
    return str(expression)
