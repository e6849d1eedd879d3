"""Reading and writing in folders that others have filled: bounded, strict, and nowhere else.

A file may be damaged, or made to do harm. What is read here is plain data of bounded size and depth, with every key
once. Whatever is wrong with it is a ``ValueError`` or an ``OSError``; who asked says in which file.
"""

import itertools
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 26
"""Of a JSON file."""

MAX_YAML_BYTES = 1 << 20
"""Of YAML, which people write and which takes seconds a megabyte to read."""

MAX_DEPTH = 64
"""Of lists and mappings in each other."""

MAX_NODES = 1 << 18
"""Of YAML whose aliases are written out: each may double what is before it."""


MAX_NAME = 255
"""Of one file, in characters."""

MAX_COUNT = 1 << 62
"""Of what is counted: units, bytes, operations, steps."""

_PLAIN = (str, int, float, type(None))
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no file, larger than ``max_bytes``, or not UTF-8.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:  # a pipe would be waited for, a device never ends
        raise ValueError(f"it is {_KINDS.get(kind, 'a device')}, no file")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return data.decode("utf-8")


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no file, too large or too deep, not UTF-8, no JSON, or has a key twice.
    """
    return parse_json(read_text(path, max_bytes))


def parse_json(text: str) -> Any:
    """Return what JSON text says.

    Raises:
        ValueError: If it is no JSON, too deep, or has a key twice.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(f"lists and objects in each other are more than {MAX_DEPTH} deep") from error
    _check_plain(data)
    return data


class _Loader(yaml.SafeLoader):
    """Reads 3e-5 as a number, as YAML 1.2 and everybody who writes a learning rate do; YAML 1.1 sees a text."""

    def get_single_node(self) -> Any:
        """Return the document as nodes, whose aliases are not written out yet."""
        root = super().get_single_node()
        _count_nodes(root, {}, set())
        return root


class _Dumper(yaml.SafeDumper):
    """Quotes texts that ``_Loader`` would read as numbers."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """Return what YAML text says.

    Raises:
        ValueError: If it is no YAML, too large or too deep, has a key twice, or more than plain data in it.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it is larger than {MAX_YAML_BYTES} bytes")
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data, never objects
    except RecursionError as error:
        raise ValueError(f"lists and mappings in each other are more than {MAX_DEPTH} deep") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    _check_plain(data)
    return data


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML that ``parse_yaml`` reads as the same."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False)
    return text


def inside(folder: Path, name: Any) -> Path:
    """Return the path of something in a folder, whose name stands in a file.

    Args:
        folder: The folder.
        name: A relative path, with ``/`` between its parts.

    Raises:
        ValueError: If that is no path, or one of something outside of the folder, links included.
    """
    if not is_line(name) or max(map(len, name.split("/"))) > MAX_NAME:
        raise ValueError(f"got {name!r:.80}; allowed: the name of something in the folder")
    path: Path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not is_inside(folder, path):
        raise ValueError(f"{name!r:.80} is outside of the folder")
    return path


def is_inside(folder: Path, path: Path) -> bool:
    """Return whether a path, its links followed, leads to something in a folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a name too long, or links in a circle
        return False


def write_new(path: Path, text: str) -> None:
    """Write a file: all of it or nothing, in place of what has its name. Links are replaced, never followed.

    Raises:
        OSError: If it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8") as file:  # "x" follows no link either
            file.write(text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_count(value: Any) -> bool:
    """Return whether a value is an int that can be a size or a number of steps; True and False are none."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def is_number(value: Any) -> bool:
    """Return whether a value is a number that can be computed with, also one that is not finite."""
    return type(value) is float or (type(value) is int and abs(value) <= MAX_COUNT)


def is_line(value: Any) -> bool:
    """Return whether a value is a text of one line, without anything that would control a terminal."""
    return isinstance(value, str) and bool(value) and value.isprintable()


def are_texts(values: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(values, list | tuple) and all(isinstance(each, str) for each in values)


def are_positions(values: Any, size: int | None = None) -> bool:
    """Return whether a value is a list of ascending positions, each once, below ``size`` if that is known."""
    if not isinstance(values, list | tuple) or not all(map(is_count, values)):
        return False
    rising = all(low < high for low, high in itertools.pairwise(values))
    return rising and (size is None or not values or values[-1] < size)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse_duplicates(key for key, _ in pairs)
    return found


def _refuse_duplicates(keys: Iterable[Any]) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"the key {key!r:.80} is there twice")
        seen.add(key)


def _check_plain(data: Any) -> None:
    """Check depth and kinds, without recursion."""
    level = [data]
    for _ in range(MAX_DEPTH):
        for each in level:
            if not isinstance(each, (*_PLAIN, dict, list)):
                raise ValueError(f"{str(each)!r:.80} is read as a {type(each).__name__}; allowed: numbers and texts")
        level = [item for each in level if isinstance(each, dict | list) for item in _items(each)]
        if not level:
            return
    raise ValueError(f"lists and mappings in each other are more than {MAX_DEPTH} deep")


def _items(data: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return data if isinstance(data, list) else data.values()


def _count_nodes(node: Any, known: dict[int, int], above: set[int]) -> int:
    """Return how many nodes YAML has with its aliases written out; as deep as it is nested."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise yaml.YAMLError("an alias stands for something that it is in")
    children: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
        _refuse_duplicates(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    above.add(id(node))
    total = 1 + sum(_count_nodes(child, known, above) for child in children)
    above.discard(id(node))
    if total > MAX_NODES:
        raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_NODES} values")
    known[id(node)] = total
    return total
