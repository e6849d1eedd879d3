"""The package's own rules: imports point one way, files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_compress

PACKAGE = Path(hf_compress.__file__).parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_PUBLIC_METHODS = 8

LAYERS: list[set[str]] = [
    {"errors"},
    {"registry", "loading", "reading"},
    {"schedule"},
    {"config"},
    {"graph", "pruning", "quantization", "distillation"},
    {"instruments"},
    {"shrinking"},
    {"latency"},
    {"teachers"},
    {"callbacks", "report", "vocabulary"},
    {"oneshot"},
    {"ptq"},
    {"export", "search", "metrics"},
    {"recipe"},
    {"commands"},
    {"cli", "extend"},
    {"__main__"},
]
"""Lowest first. A part may import from lower layers and from itself, not from its siblings."""

RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "hf_compress":
                yield rest[0] if rest else "__init__"


def violations(part: str, source: str) -> list[str]:
    allowed = {other for other, rank in RANK.items() if rank < RANK[part]} | {part}
    return sorted(set(imported_parts(ast.parse(source))) - allowed)


def long_functions(source: str) -> list[str]:
    """Names of functions with too many lines; docstrings do not count."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name for node in nodes if num_lines(node) > MAX_FUNCTION_LINES]


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def large_classes(source: str) -> list[str]:
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if len(public_methods(node)) > MAX_PUBLIC_METHODS]


def public_methods(node: ast.ClassDef) -> list[str]:
    functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return [item.name for item in functions if not item.name.startswith("_") and not item.name.startswith("on_")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.isascii()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert long_functions(source) == []
    assert large_classes(source) == []
    if path != PACKAGE / "__init__.py":
        assert violations(part_of(path), source) == []


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(RANK)


@pytest.mark.parametrize(
    ("part", "source", "expected"),
    [
        ("graph", "from hf_compress.callbacks.base import Run", ["callbacks"]),
        ("graph", "from hf_compress.pruning import criteria", ["pruning"]),
        ("report", "def f():\n    import hf_compress.callbacks.base", ["callbacks"]),
        ("config", "import hf_compress", ["__init__"]),
        ("config", "from hf_compress import shrink", ["shrink"]),
        ("callbacks", "from hf_compress.graph.model import dimension_groups", []),
        ("graph", "from hf_compress.graph.dims import Dim", []),
    ],
)
def test_the_rule_catches_planted_imports(part: str, source: str, expected: list[str]) -> None:
    assert violations(part, source) == expected


def test_the_limits_catch_planted_sizes() -> None:
    body = "\n".join(f"    x = {i}" for i in range(MAX_FUNCTION_LINES))
    assert long_functions(f"def long():\n{body}") == ["long"]
    assert long_functions(f"def short():\n{body}".rsplit("\n", 1)[0]) == []
    documented = body.rsplit("\n", 1)[0]
    assert long_functions(f'def documented():\n    """A\n\n    b."""\n{documented}') == []
    methods = "\n".join(f"    def m{i}(self): ..." for i in range(MAX_PUBLIC_METHODS + 1))
    assert large_classes(f"class Large:\n{methods}") == ["Large"]
