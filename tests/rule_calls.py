"""Calls of op rules, written with a letter for each dimension.

``call("aten::mm", self="ab", mat2="bc")`` has an operand [2, 3] and another [3, 5] of six dimensions, none of which is
known to be another; equal letters have equal sizes. What the rule makes of them is written the same way.
"""

from collections.abc import Mapping
from typing import Any

from hf_compress.graph.dims import Dim, find
from hf_compress.graph.op_rules import OpCall, Operand
from hf_compress.registry import op_rules

SIZES = {"a": 2, "b": 3, "c": 5, "d": 7, "e": 11, "f": 13, "g": 12, "h": 4, "0": 0, "1": 1}


def operand(letters: str, source: str | None = None, values: Dim | None = None) -> Operand:
    """An operand with a dimension of its own for each letter; with ``source``, all of that parameter."""
    dims = [Dim(SIZES[letter]) for letter in letters]
    return Operand(dims, None if source is None else (source, tuple(range(len(dims)))), values)


def letters_to_operands(value: Any) -> Any:
    if isinstance(value, str):
        return operand(value)
    return [letters_to_operands(each) for each in value] if isinstance(value, list) else value


class Called:
    """What a rule said."""

    def __init__(self, name: str, letters: Mapping[str, Any], op: OpCall) -> None:
        self.op = op
        self.known: dict[str, list[Dim]] = {}
        for argument, value in letters.items():
            found = op.arguments[argument]
            pairs = zip(value, found, strict=True) if isinstance(value, list) else [(value, found)]
            for each, made in pairs:
                if isinstance(each, str):
                    for letter, dim in zip(each, made.dims, strict=True):
                        self.known.setdefault(letter, []).append(dim)
        result = op_rules.get(name)(op)
        assert isinstance(result, tuple) == (len(op.shapes) > 1) or op.shapes == [None]
        self.results = list(result) if isinstance(result, tuple) else [result]
        sizes = [None if dims is None else tuple(dim.size for dim in dims) for dims in self.results]
        assert sizes == op.shapes

    def letter(self, dim: Dim) -> str:
        """The letter of a dimension; ``?`` if it is no operand's."""
        same = [each for each, dims in self.known.items() if any(find(dim) is find(own) for own in dims)]
        return same[0] if same else "?"

    @property
    def result(self) -> list[str | None]:
        """Each result, in letters."""
        return [None if dims is None else "".join(map(self.letter, dims)) for dims in self.results]

    @property
    def roles(self) -> set[tuple[str, str]]:
        """Letters with the roles they got."""
        return {(self.letter(mark.dim), mark.role) for mark in self.op.marks}

    @property
    def unified(self) -> set[str]:
        """The letters of which all dimensions are one now."""
        return {
            letter for letter, dims in self.known.items() if len(dims) > 1 and len({find(dim) for dim in dims}) == 1
        }


def call(name: str, *shapes: str | tuple[int, ...] | None, **arguments: Any) -> Called:
    """Apply a rule to operands in letters; ``shapes`` are of the results."""
    sizes = [tuple(SIZES[letter] for letter in each) if isinstance(each, str) else each for each in shapes]
    made = {key: letters_to_operands(value) for key, value in arguments.items()}
    return Called(
        name, {k: v for k, v in arguments.items() if isinstance(v, str | list)}, OpCall(name, "module", made, sizes)
    )
