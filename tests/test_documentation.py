"""The reference of public names has no gaps, and the pages about the code say what is there."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pdoc.doc
import pytest
from test_layers import LAYERS, PACKAGE

import hf_compress
from hf_compress import extend

README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (PACKAGE / "ARCHITECTURE.md").read_text(encoding="utf-8")


def public(module: pdoc.doc.Module) -> Iterator[pdoc.doc.Doc]:
    """Yield the public names of a module and what their classes add to those of other packages."""
    for member in module.members.values():
        yield member
        if isinstance(member, pdoc.doc.Class):
            for inner in member.own_members:
                if not inner.name.startswith(("_", "on_")):
                    yield inner


def undocumented(module: pdoc.doc.Module) -> list[str]:
    return [each.fullname for each in public(module) if not each.docstring.strip()]


@pytest.mark.parametrize("module", [hf_compress, extend], ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module) -> None:
    assert set(module.__all__) <= set(pdoc.doc.Module(module).members)
    assert undocumented(pdoc.doc.Module(module)) == []


def test_a_gap_is_seen(tmp_path, monkeypatch) -> None:
    source = '"""A."""\n\nclass Known:\n    """B."""\n\n    def gap(self): ...\n\n\ndef other(): ...\n'
    (tmp_path / "module_with_gaps.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_with_gaps")
    assert undocumented(pdoc.doc.Module(module)) == ["module_with_gaps.Known.gap", "module_with_gaps.other"]


def test_every_part_says_what_it_is_and_the_page_says_the_same() -> None:
    parts = [part for row in LAYERS for part in row if (PACKAGE / part / "__init__.py").is_file()]
    for part in parts:
        docstring = ast.get_docstring(ast.parse((PACKAGE / part / "__init__.py").read_text(encoding="utf-8")))
        assert f"| [`{part}`]({part}/__init__.py) | {docstring} |" in ARCHITECTURE


def test_the_page_has_the_parts_in_their_order() -> None:
    table = re.findall(r"^\| (\[`.*?)\s\|", ARCHITECTURE, flags=re.MULTILINE)
    found = [name for row in table for name in re.findall(r"\[`(\w+)`\]", row)]
    rank = {part: i for i, row in enumerate(LAYERS) for part in row}
    assert set(found) == set(rank)
    assert [rank[name] for name in found] == sorted((rank[name] for name in found), reverse=True)


def test_the_page_names_what_exists() -> None:
    for target in re.findall(r"\]\(([\w./]+)\)", ARCHITECTURE):
        assert (PACKAGE / target).exists(), target
    folder = PACKAGE.parent
    inside = "tests|graph|callbacks|shrinking|export|recipe|config"
    for line in ARCHITECTURE.splitlines():
        for name in re.findall(rf"`((?:{inside})/[\w./]*|test_\w+\.py)`", line):
            here = [folder / name, PACKAGE / name, *(folder / "tests").rglob(name)]
            assert any(path.exists() for path in here), name
    for dotted in re.findall(r"`(\w+(?:\.\w+)*\.[A-Z]\w+)`", ARCHITECTURE):
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(f"hf_compress.{module}"), name), dotted


def test_links_within_the_readme_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert [link for link in links if link.startswith("#") and link[1:] not in anchors] == []
    files = [link for link in links if not link.startswith(("#", "http"))]
    assert [link for link in files if not (Path(PACKAGE.parent) / link).exists()] == []
