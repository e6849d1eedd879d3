"""Nothing that is shipped unpickles, evaluates text as code, or unpacks archives without looking.

Source code is searched, not text: also the programs that are kept as strings and run in processes of their own.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_compress

PACKAGE = Path(hf_compress.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "jsonpickle",
}
"""Whatever reads their formats runs what is in the file."""

CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.serialization.load",
    "torch.hub.load",
    "pandas.read_pickle",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.load_all",
    "os.system",
    "os.popen",
    "shutil.unpack_archive",
    "tempfile.mktemp",
    "runpy.run_path",
    "code.interact",
}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
LOADERS = {"FullLoader", "UnsafeLoader", "Loader", "CLoader", "CFullLoader", "CUnsafeLoader"}
METHODS = {"extractall", "read_pickle", "to_pickle"}
FLAGS = {
    "allow_pickle": True,
    "trust_remote_code": True,
    "shell": True,
    "weights_only": False,
    "safe_serialization": False,
}
"""Arguments with the value that makes a call unsafe; one that is computed counts as unsafe."""


def dotted(node: ast.AST) -> str:
    """Return a name such as ``torch.load``, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Return what names stand for: ``np`` for numpy, ``load`` for ``torch.load``."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
    return found


def safe_loaders(tree: ast.AST, known: dict[str, str]) -> set[str]:
    """Return the names of the classes that inherit from yaml's safe loader."""
    classes = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(resolved(base, known) in classes for base in node.bases):
            classes.add(node.name)
    return classes


def resolved(node: ast.AST, known: dict[str, str]) -> str:
    first, _, rest = dotted(node).partition(".")
    first = known.get(first, first)
    return f"{first}.{rest}" if rest else first


def imports(node: ast.AST) -> Iterator[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        module, _, last = name.rpartition(".")
        if name.split(".")[0] in MODULES or (module == "yaml" and last in LOADERS):
            yield f"import {name}"


def references(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """Yield names that are unsafe to call: what is only mentioned may be called later."""
    if isinstance(node, ast.Attribute) and resolved(node, known).partition(".")[0] == "yaml" and node.attr in LOADERS:
        yield f"yaml.{node.attr}"
    if isinstance(node, ast.Name | ast.Attribute) and resolved(node, known) in CALLS:
        yield resolved(node, known)


def constant(node: ast.AST | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def calls(node: ast.AST, known: dict[str, str], loaders: set[str]) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name = resolved(node.func, known)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if name in BUILTINS:
        yield name
    if method in METHODS and constant(keywords.get("filter")) != "data":
        yield method
    if name == "importlib.import_module" and any(constant(each) in MODULES for each in node.args):
        yield name
    if name == "yaml.load" and resolved(keywords.get("Loader", ast.Constant(None)), known) not in loaders:
        yield name
    for flag, bad in FLAGS.items():
        given = keywords.get(flag)
        if given is not None and constant(given) in (None, bad):
            yield f"{flag}={bad}"


def programs(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield programs that are kept as texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                yield ast.parse(node.value)
            except SyntaxError:
                continue


def dangers(source: str) -> list[str]:
    """Return what is unsafe in a source file."""
    found: list[str] = []
    tree = ast.parse(source)
    for part in [tree, *programs(tree)]:
        known = aliases(part)
        loaders = safe_loaders(part, known)
        for node in ast.walk(part):
            found += [*imports(node), *references(node, known), *calls(node, known, loaders)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_safe(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


def test_there_are_files_to_search() -> None:
    assert len(FILES) > 200


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["import pickle"]),
        ("import os, dill as d", ["import dill"]),
        ("from cloudpickle import loads", ["import cloudpickle.loads"]),
        ("def f():\n    import shelve", ["import shelve"]),
        ("from marshal import load as l", ["import marshal.load"]),
        ("import joblib.externals", ["import joblib.externals"]),
        ("import torch\ntorch.load(p, weights_only=True)", ["torch.load"]),
        ("import torch as t\nt.save(x, p)", ["torch.save"]),
        ("from torch import load\nload(p)", ["torch.load"]),
        ("import torch\nread = torch.load", ["torch.load"]),
        ("import torch\ntorch.hub.load('a/b', 'c')", ["torch.hub.load"]),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", ["allow_pickle=True"]),
        ("import numpy\nnumpy.load(p, allow_pickle=flag)", ["allow_pickle=True"]),
        ("import yaml\nyaml.load(t)", ["yaml.load"]),
        ("import yaml\nyaml.load(t, Loader=yaml.FullLoader)", ["yaml.load", "yaml.FullLoader"]),
        ("import yaml\nclass L(yaml.FullLoader): pass\nyaml.load(t, Loader=L)", ["yaml.FullLoader", "yaml.load"]),
        ("from yaml import UnsafeLoader", ["import yaml.UnsafeLoader"]),
        ("import yaml\nyaml.unsafe_load(t)", ["yaml.unsafe_load"]),
        ("eval('1')", ["eval"]),
        ("exec(text)", ["exec"]),
        ("compile(text, 'f', 'exec')", ["compile"]),
        ("__import__(name)", ["__import__"]),
        ("AutoModel.from_pretrained(n, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("AutoModel.from_pretrained(n, trust_remote_code=given)", ["trust_remote_code=True"]),
        ("model.save_pretrained(f, safe_serialization=False)", ["safe_serialization=False"]),
        ("import subprocess\nsubprocess.run(c, shell=True)", ["shell=True"]),
        ("import os\nos.system(c)", ["os.system"]),
        ("import pandas as pd\npd.read_pickle(p)", ["pandas.read_pickle", "read_pickle"]),
        ("archive.extractall(folder)", ["extractall"]),
        ("archive.extractall(folder, filter='fully_trusted')", ["extractall"]),
        ("import importlib\nimportlib.import_module('pickle')", ["importlib.import_module"]),
        ('SCRIPT = """\nimport pickle\npickle.loads(data)\n"""', ["import pickle"]),
        ("model.eval()", []),
        ("re.compile(p); torch.compile(m)", []),
        ("archive.extractall(folder, filter='data')", []),
        ("import numpy\nnumpy.load(p, allow_pickle=False)", []),
        ("import yaml\nyaml.safe_load(t)", []),
        ("import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load(t, Loader=L)", []),
        ("from safetensors.torch import load_file, save_file\nload_file(p)", []),
        ("AutoModel.from_pretrained(n, trust_remote_code=False)", []),
        ('"""Words about import pickle are no program."""', []),
    ],
)
def test_the_search_catches_what_is_planted(source: str, expected: list[str]) -> None:
    assert sorted(dangers(source)) == sorted(expected)
