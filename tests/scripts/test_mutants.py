"""Mutants: what is changed, what is left alone, and that tests which notice are told from those that do not."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("mutants", "mutations"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["x = a <= b"]),
        ("x = a is None", ["x = a is not None"]),
        ("x = a + b", ["x = a - b"]),
        ("x = a and b", ["x = a or b"]),
        ("x = not a", ["x = a"]),
        ("x = 3", ["x = 4"]),
        ("x = True", ["x = False"]),
        ("f(a)", ["pass"]),
        ("if a:\n    b", ["if not a:\n    b"]),
        ("def f(x: Literal[1]=a) -> int:\n    return x", ["def f(x: Literal[1]=a) -> int:\n    return None"]),
        ('"""Text."""', []),
        ("raise Error(1 + 2)", []),
        ("assert a < 3", []),
        ("x = f'{a + 1}'", []),
        ("def f():\n    return None", []),
        ("x = a < b < c", []),
        ("x = a[0] == 1", ["x = a[0] != 1", "x = a[1] == 1", "x = a[0] == 2"]),
    ],
)
def test_what_is_changed(scripts, source, expected) -> None:
    module = scripts("mutations")
    tree = ast.parse(source)
    assert [module.mutated(tree, each).strip() for each in module.mutations(tree)] == expected
    assert ast.unparse(tree) == ast.unparse(ast.parse(source))


def test_a_mutation_is_in_the_line_where_its_statement_begins(scripts) -> None:
    module = scripts("mutations")
    tree = ast.parse("a = 'text'\nx = f(\n    b,\n    2,\n)")
    assert [each.line for each in module.mutations(tree)] == [2]


def test_mutants_die_by_tests_that_notice(scripts, tmp_path) -> None:
    module = scripts("mutants")
    (tmp_path / "hf_compress" / "graph").mkdir(parents=True)
    (tmp_path / "hf_compress" / "graph" / "sizes.py").write_text("def half(n):\n    return n // 2\n", encoding="utf-8")
    (tmp_path / "test_sizes.py").write_text(
        "import hf_compress.graph.sizes as sizes\n\n\ndef test_it_runs():\n    sizes.half(4)\n\n\n"
        "def test_the_value():\n    assert sizes.half(4) == 2\n",
        encoding="utf-8",
    )
    whole = (tmp_path / "hf_compress" / "graph" / "sizes.py").read_text(encoding="utf-8")
    first, *_ = module.all_mutants(["graph"], tmp_path)
    assert (first.mutation.what, first.mutation.line) == ("return None", 2)
    weak, strong = "test_sizes.py::test_it_runs", "test_sizes.py::test_the_value"
    survived = module.outcome_of(first, [weak], tmp_path, 60)
    assert (survived.killed, survived.by) == (False, "1 tests run the line")
    killed = module.outcome_of(first, [weak, strong], tmp_path, 60)
    assert (killed.killed, killed.by) == (True, f"FAILED {strong}")
    assert not module.outcome_of(first, [], tmp_path, 60).killed
    assert (tmp_path / "hf_compress" / "graph" / "sizes.py").read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("name", ["test_that_is_gone", "test_that_fails_anyway"])
def test_what_fails_without_the_change_kills_nothing(name, scripts, tmp_path) -> None:
    module = scripts("mutants")
    (tmp_path / "hf_compress" / "graph").mkdir(parents=True)
    (tmp_path / "hf_compress" / "graph" / "sizes.py").write_text("def half(n):\n    return n // 2\n", encoding="utf-8")
    (tmp_path / "test_sizes.py").write_text("def test_that_fails_anyway():\n    assert not 1\n", encoding="utf-8")
    first, *_ = module.all_mutants(["graph"], tmp_path)
    with pytest.raises(SystemExit, match="without any change"):
        module.outcome_of(first, [f"test_sizes.py::{name}"], tmp_path, 60)


def test_lines_that_run_at_import_count_for_the_tests_of_their_file(scripts, tmp_path, monkeypatch) -> None:
    module = scripts("mutants")
    monkeypatch.setattr(module, "COVERAGE", tmp_path)
    with pytest.raises(SystemExit, match="Run: bash scripts/coverage"):
        module.tests_of_lines()
    data = module.CoverageData(str(tmp_path / "data"))
    one, other = (str(module.ROOT / "hf_compress" / name) for name in ("errors.py", "registry.py"))
    for context, lines in {
        "": [1, 2, 5],
        "a.py::test|run": [3, 5],
        "a.py::test|setup": [3],
        "b.py::test|run": [4],
    }.items():
        data.set_context(context)
        data.add_lines({one: lines, **({other: [1]} if not context else {})})
    data.write()
    both = ["a.py::test", "b.py::test"]
    assert module.tests_of_lines() == {
        "hf_compress/errors.py": {1: both, 2: both, 3: both[:1], 4: both[1:], 5: both[:1]},
        "hf_compress/registry.py": {1: []},
    }


def test_a_part_that_is_not_there(scripts, tmp_path) -> None:
    with pytest.raises(SystemExit, match="there is no"):
        scripts("mutants").all_mutants(["grpah"], tmp_path)


def test_without_coverage_the_remedy_is_said(scripts, tmp_path, monkeypatch) -> None:
    module = scripts("mutants")
    monkeypatch.setattr(module, "COVERAGE", tmp_path)
    with pytest.raises(SystemExit, match=r"bash scripts/coverage"):
        module.tests_of_lines()
