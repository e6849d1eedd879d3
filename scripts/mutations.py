"""Small changes of a program, each of which changes what it computes (as a rule)."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


Place = tuple[tuple[str, int | None], ...]
"""Fields, with positions in lists, that lead from the module to a node."""

Change = Callable[[ast.AST, Place], None]


@dataclass(frozen=True)
class Mutation:
    """What can be changed in a program."""

    place: Place
    line: int
    """Where the statement begins; that is what coverage counts."""

    what: str
    change: Change


def mutations(tree: ast.Module) -> Iterator[Mutation]:
    """Yield every mutation of a program.

    Left out is what tests need not look at: texts, annotations, messages of errors, assertions, imports.
    """
    for place, line in _places(tree):
        for what, change in _changes(_at(tree, place)):
            yield Mutation(place, line, what, change)


def mutated(tree: ast.Module, mutation: Mutation) -> str:
    """Return the source of the changed program; the tree stays as it is."""
    changed = copy.deepcopy(tree)
    mutation.change(changed, mutation.place)
    return ast.unparse(ast.fix_missing_locations(changed)) + "\n"


def _places(tree: ast.Module) -> Iterator[tuple[Place, int]]:
    """Yield where expressions and statements are, each with the line of its statement."""

    def visit(node: ast.AST, place: Place, line: int) -> Iterator[tuple[Place, int]]:
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
            return
        line = node.lineno if isinstance(node, ast.stmt) else line
        yield place, line
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, child in children:
                if isinstance(child, ast.AST):
                    yield from visit(child, (*place, (name, index)), line)

    yield from visit(tree, (), 0)


def _at(tree: ast.AST, place: Place) -> ast.AST:
    for name, index in place:
        value = getattr(tree, name)
        tree = value if index is None else value[index]
    return tree


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """Yield what can be done to a node, each with its name."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = COMPARISONS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {other.__name__}", _field("ops", [other()])
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        other_op = ARITHMETIC[type(node.op)]
        yield f"{type(node.op).__name__} -> {other_op.__name__}", _field("op", other_op())
    elif isinstance(node, ast.BoolOp):
        word = "Or" if isinstance(node.op, ast.And) else "And"
        yield f"{type(node.op).__name__} -> {word}", _field("op", ast.Or() if word == "Or" else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not x -> x", _replace(node.operand)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "condition -> not condition", _field("test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", _field("value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield f"{node.value} -> {node.value + 1}", _field("value", node.value + 1)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await):
        yield f"without {ast.unparse(node.value)[:40]}", _replace(ast.Pass())
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "return None", _field("value", ast.Constant(None))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _field(name: str, value: object) -> Change:
    def change(tree: ast.AST, place: Place) -> None:
        setattr(_at(tree, place), name, copy.deepcopy(value))

    return change


def _replace(node: ast.AST) -> Change:
    def change(tree: ast.AST, place: Place) -> None:
        *parents, (name, index) = place
        parent = _at(tree, tuple(parents))
        if index is None:
            setattr(parent, name, copy.deepcopy(node))
        else:
            getattr(parent, name)[index] = copy.deepcopy(node)

    return change
