"""What an operator says about dimensions: the contract of a rule, and how to add one.

A rule gets the call and returns the dimensions of its result. On the way it may ``unify`` dimensions that must be
the same, ``contract`` an input with a weight, and ``mark`` roles that decide later what may be pruned::

    @op_rule("mylib::scale_rows")            # scale_rows(Tensor x, Tensor scale) -> Tensor
    def scale_rows(op: OpCall) -> list[Dim]:
        x, scale = op.tensor("x"), op.tensor("scale")
        op.unify(x.dims[0], scale.dims[0])
        return x.dims

Operators without a rule freeze every dimension they touch, with themselves as the reason: never a guess.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_compress.errors import ConfigError, GraphError, choices
from hf_compress.graph.dims import ConflictError, Dim, unify
from hf_compress.graph.roles import ROLES
from hf_compress.registry import op_rules

_NAME = re.compile(r"\w+::\w+")

Source = tuple[str, tuple[int | None, ...]]
"""A parameter's name and, per tensor dimension, the parameter's dimension (None for a new one)."""


@dataclass(eq=False)
class Operand:
    """A tensor as the analysis sees it."""

    dims: list[Dim]
    """One per tensor dimension, outermost first."""

    source: Source | None = None
    """Where the values come from, if the tensor is a parameter, perhaps transposed or with some rows picked."""

    values: Dim | None = None
    """For integers that are positions along a dimension (as topk returns): that dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""
        return tuple(dim.size for dim in self.dims)


@dataclass(frozen=True, eq=False)
class Mark:
    """A role that an operator gives to a dimension."""

    dim: Dim
    role: str
    op: str
    module: str
    amount: int = 1
    """For ``ranked``: how many positions are picked."""


@dataclass(frozen=True)
class Consumer:
    """A parameter dimension that is contracted with activations: where a unit's effect enters the rest."""

    parameter: str
    dim: int
    module: str
    """Name of the module that made the call: not the parameter's own where weights are tied."""


Result = list[Dim] | tuple[list[Dim] | None, ...]
"""Dimensions of one result, or a tuple of them for operators with several."""

Rule = Callable[["OpCall"], Result]


def op_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators given as ``"namespace::name"`` (all overloads and the in-place form).

    Raises:
        ConfigError: If no name is given, one is of another form or has a rule already, or what is decorated cannot be
            called.
    """
    wrong = [name for name in names if not isinstance(name, str) or not _NAME.fullmatch(name)]
    if wrong or not names:
        raise ConfigError(f'op_rule: got {wrong[0] if wrong else "no name"!r}; allowed: names such as "mylib::scale".')

    def add(rule: Rule) -> Rule:
        if not callable(rule):
            raise ConfigError(f"op_rule({names[0]!r}): got {rule!r}; allowed: a function of one OpCall.")
        registered: Rule = op_rules.register(*names)(rule)
        return registered

    return add


@dataclass(eq=False)
class OpCall:
    """One recorded operator call."""

    name: str
    """``namespace::name`` of the operator."""

    module: str
    """Name of the module that made the call."""

    arguments: dict[str, Any]
    """By schema name, defaults filled in; tensors are ``Operand`` objects."""

    shapes: list[tuple[int, ...] | None]
    """Shapes of the results; None for results that are no tensors."""

    live: bool = True
    """Whether the model's output depends on the call. Dead calls still run, so they unify, but give no roles."""

    marks: list[Mark] = field(default_factory=list)
    """Filled by ``mark``."""

    consumers: list[Consumer] = field(default_factory=list)
    """Filled by ``contract``."""

    source: Source | None = None
    """Set by a rule whose result is (part of) a parameter."""

    values: tuple[Dim | None, ...] = ()
    """Set by a rule whose results hold positions along a dimension, one entry per result."""

    def tensor(self, name: str) -> Operand:
        """Return the argument ``name``, which must be a tensor.

        Raises:
            GraphError: If there is no such argument, or it is something else.
        """
        operand = self.arguments.get(name)
        if not isinstance(operand, Operand):
            known = choices(name, [key for key, value in self.arguments.items() if isinstance(value, Operand)])
            raise GraphError(f"the op rule of {self.name} asks for the tensor {name!r}; {known}.")
        return operand

    def optional(self, name: str) -> Operand | None:
        """Return the argument ``name`` if it is a tensor, else None."""
        operand = self.arguments.get(name)
        return operand if isinstance(operand, Operand) else None

    def operands(self) -> list[Operand]:
        """Return every tensor argument in order, those in lists too."""
        found: list[Operand] = []
        for value in self.arguments.values():
            items = value if isinstance(value, list | tuple) else [value]
            found += [item for item in items if isinstance(item, Operand)]
        return found

    def unify(self, a: Dim, b: Dim) -> None:
        """Say that two dimensions are the same; what cannot be made the same is frozen."""
        try:
            unify(a, b)
        except ConflictError:
            self.mark(a, "conflict")
            self.mark(b, "conflict")

    def mark(self, dim: Dim, role: str, amount: int = 1) -> None:
        """Give ``dim`` a role; see ``hf_compress.graph.roles`` for those that freeze.

        Raises:
            GraphError: If there is no such role.
        """
        if role not in ROLES:
            raise GraphError(f"the op rule of {self.name} gives the role {role!r}; {choices(role, ROLES)}.")
        if self.live or role == "conflict":
            self.marks.append(Mark(dim, role, self.name, self.module, amount))

    def contract(self, a: Operand, i: int, b: Operand, j: int) -> None:
        """Say that dimension ``i`` of ``a`` is summed over together with dimension ``j`` of ``b``."""
        self.unify(a.dims[i], b.dims[j])
        weights = [(x, d) for x, d in ((b, j), (a, i)) if x.source is not None]
        if len(weights) == 1:
            (weight, dim), *_ = weights
            assert weight.source is not None
            owned = weight.source[1][dim]
            if owned is not None:
                self.consumers.append(Consumer(weight.source[0], owned, self.module))
                self.mark(b.dims[j], "contracted")
                return
        self.mark(b.dims[j], "contracted_activations")

    def freeze(self, role: str = "opaque") -> Result:
        """Freeze everything the call touches and return fresh, frozen result dimensions."""
        for operand in self.operands():
            for dim in operand.dims:
                self.mark(dim, role)
        results: list[list[Dim] | None] = []
        for shape in self.shapes:
            dims = None if shape is None else [Dim(size) for size in shape]
            for dim in dims or []:
                self.mark(dim, role)
            results.append(dims)
        return results[0] or [] if len(results) == 1 else tuple(results)

    def axis(self, name: str, num_dims: int) -> int:
        """Return the integer argument ``name`` as a non-negative dimension."""
        return int(self.arguments[name]) % max(num_dims, 1)


def unify_trailing(op: OpCall, operand: Operand, dims: Sequence[Dim]) -> None:
    """Unify an operand that broadcasts against ``dims``, aligned at the end."""
    for own, other in zip(reversed(operand.dims), reversed(dims), strict=False):
        if own.size == other.size:
            op.unify(own, other)
