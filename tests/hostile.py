"""Files made to do harm, and the law for whoever reads them: an error that names the file, and nothing else happens."""

import json
import os
import re
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_compress import CompressionError

MAX_SECONDS = 20
MAX_MEGABYTES = 400
DEEP = 100_000
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
)
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
"""What a terminal would obey."""

NOT_TEXT: dict[str, bytes] = {
    "empty": b"",
    "a zero byte": b"\0",
    "random": bytes(range(256)),
    "not utf-8": b'{"model": "\xff\xfe"}',
    "utf-16": '{"model": "x"}'.encode("utf-16"),
}

JSON: dict[str, bytes] = {
    **NOT_TEXT,
    "cut off": b'{"schema_version": 1, "model',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a text": b'"text"',
    "deep lists": b'{"model": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a": ' * DEEP + b"1" + b"}" * DEEP,
    "open brackets": b"[" * DEEP,
    "a key twice": b'{"schema_version": 1, "schema_version": 1}',
    "a long number": b'{"schema_version": 1' + b"0" * 100_000 + b"}",
    "two documents": b"{} {}",
    "unknown key": b'{"no such key": 1}',
    "control characters": json.dumps({ESCAPE: ESCAPE}).encode(),
    "a long name": json.dumps({"n" * 1_000_000: 1}).encode(),
    "a future version": b'{"schema_version": 99}',
    "a version that is true": b'{"schema_version": true}',
    "a version that is text": b'{"schema_version": "1"}',
}

YAML: dict[str, bytes] = {
    **NOT_TEXT,
    "cut off": b'schema_version: "1',
    "a list": b"[1, 2]",
    "a number": b"7",
    "a tab": b"model:\n\t- x",
    "an object": b"model: !!python/object/apply:os.system ['touch outside/ran']",
    "a name of python": b"model: !!python/name:os.system",
    "a module": b"model: !!python/module:os",
    "a tuple": b"model: !!python/tuple [1, 2]",
    "a new object": b"!!python/object/new:os.system [touch outside/ran]",
    "an unknown tag": b"model: !mine x",
    "aliases": BOMB.encode(),
    "aliases as a model": f"model: *m\n{BOMB}".encode(),
    "merges": MERGES.encode(),
    "an alias of itself": b"model: &m [*m]",
    "a mapping in itself": b"&m {model: *m}",
    "deep lists": b"model: " + b"[" * DEEP,
    "deep mappings": b"model: " + b"{a: " * DEEP,
    "deep blocks": b"- " * DEEP,
    "a key twice": b"schema_version: 1\nschema_version: 1",
    "a list as key": b"? [1, 2]\n: 3",
    "a date that is none": b"model: 2026-99-99",
    "a date": b"model: 2026-01-01",
    "bytes": b"model: !!binary aGVsbG8=",
    "a set": b"model: !!set {a, b}",
    "a long number": b"schema_version: 1" + b"0" * 100_000,
    "two documents": b"--- {}\n--- {}",
    "unknown key": b"no such key: 1",
    "control characters": f'"{json.dumps(ESCAPE)[1:-1]}": 1'.encode(),
    "raw control characters": f"model: {ESCAPE}".encode(),
    "a future version": b"schema_version: 99",
    "a version that is true": b"schema_version: true",
    "megabytes": b"# " + b"x" * 3_000_000,
}


def safetensors_file(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Return a file with a header as it is given."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def header(**tensor: Any) -> bytes:
    return json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}}).encode()


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header of 1e15 bytes": safetensors_file(b"{}", size=10**15),
    "a header of 2^64 bytes": safetensors_file(b"{}", size=2**64 - 1),
    "a header longer than the file": safetensors_file(b"{}", size=100),
    "no json": safetensors_file(b"hello"),
    "not utf-8": safetensors_file(b'{"\xff": 1}'),
    "a list": safetensors_file(b"[]"),
    "deep": safetensors_file(b'{"a": ' + b"[" * DEEP),
    "giant sizes": safetensors_file(header(shape=[10**12, 10**12]), b"\0" * 8),
    "sizes that overflow": safetensors_file(header(shape=[2**33, 2**33]), b"\0" * 8),
    "negative sizes": safetensors_file(header(shape=[-2]), b"\0" * 8),
    "offsets outside": safetensors_file(header(data_offsets=[0, 10**12]), b"\0" * 8),
    "offsets backwards": safetensors_file(header(data_offsets=[8, 0]), b"\0" * 8),
    "no data": safetensors_file(header()),
    "an unknown dtype": safetensors_file(header(dtype="F31"), b"\0" * 8),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch outside/ran'\ntR.",
}


class _Watch:
    """What Python opened and started, by its audit events."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[str] = []
        self.started: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(os.fsdecode(arguments[0]))
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn"):
            self.started.append(f"{event}{arguments!r}")


_watch = _Watch()
sys.addaudithook(_watch)


def make_outside(folder: Path) -> Path:
    """Make the folder that nobody may touch, beside ``folder``."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"secret": 1}')
    return outside


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Check what happens: bounded time and memory, nothing outside is touched, nothing is started."""
    outside = folder.parent / "outside"
    if not outside.exists():
        make_outside(folder)
    before = _entries(outside)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()  # wall time is other processes', too
    _watch.opened, _watch.started, _watch.on = [], [], True
    try:
        yield
    finally:
        _watch.on = False
    assert time.process_time() - start < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MAX_MEGABYTES
    assert _entries(outside) == before
    touched = [name for name in _watch.opened if os.path.realpath(name).startswith(str(outside.resolve()))]
    assert touched == []
    assert _watch.started == []


def _entries(outside: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in outside.iterdir()}


def refused(
    folder: Path,
    call: Callable[[], Any],
    named: str,
    errors: type[Exception] | tuple[type[Exception], ...] = CompressionError,
) -> str:
    """Check that a call ends in an error that names the file, is of readable length, and cannot drive a terminal."""
    with contained(folder), pytest.raises(errors) as caught:
        call()
    message = str(caught.value)
    assert named in message
    assert len(message) < 4000
    assert re.sub(r"\s", "", message).isprintable()
    return message


def changed(data: Any, path: str, value: Any) -> Any:
    """Return JSON data with one value changed: ``path`` is keys and places, parted by ``/``."""
    copy = json.loads(json.dumps(data))
    *outer, last = path.split("/")
    inner = copy
    for key in outer:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return copy
