"""A Hub on this machine: repositories in memory behind the classic HTTP endpoints of huggingface.co.

Uploads are regular files inside commits; LFS and Xet are never asked for. Set ``HF_ENDPOINT`` to ``FakeHub.url``
before transformers is imported, so use it from a process of its own (``FakeHub.environment``).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"

Files = dict[str, bytes]


class FakeHub:
    """What the server knows; safe to read while it runs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.commits: dict[str, list[tuple[str, Files]]] = {}
        """Repository -> (title, all its files) after every commit, the newest last."""
        self.url = ""

    def files(self, repo: str) -> Files:
        """Return the newest files of a repository by path."""
        with self.lock:
            return dict(self.commits[repo][-1][1])

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment variables of a process that is to use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_dummy",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, repo: str) -> None:
        with self.lock:
            self.commits.setdefault(repo, [("initial commit", {})])

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """Apply one commit, given as the Hub's API gets it, and return its id."""
        title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        with self.lock:
            files = dict(self.commits[repo][-1][1])
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "deletedFile":
                    files.pop(value["path"], None)
                elif key == "deletedFolder":
                    files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
            self.commits[repo].append((title, files))
        return self.revision(repo)

    def revision(self, repo: str) -> str:
        """Return the id of the newest commit."""
        with self.lock:
            return hashlib.sha1(f"{repo}@{len(self.commits[repo])}".encode()).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a Hub in a thread."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(
            {
                r"/api/whoami-v2": self._who,
                r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?": self._info,
                r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)": self._tree,
                r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)": self._file,
            }
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._answer(
            {
                r"/api/repos/create": self._create,
                r"/api/validate-yaml": lambda body: {"errors": [], "warnings": []},
                r"/api/models/([^/]+/[^/]+)/preupload/[^/]+": self._preupload,
                r"/api/models/([^/]+/[^/]+)/commit/[^/]+": self._commit,
            }
        )

    def _answer(self, routes: dict[str, Callable[..., Any]]) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        for pattern, action in routes.items():
            found = re.fullmatch(pattern, path)
            if found:
                repo = found[1] if found.groups() else None
                if repo is None or repo in self.hub.commits:
                    return self._send(action(body, *found.groups()))
        return self._send(None)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Any) -> None:
        """Send JSON, a file (bytes), or 404 for None."""
        headers = {"Content-Type": "application/json"}
        if isinstance(answer, bytes):
            digest = hashlib.sha1(answer).hexdigest()
            repo = "/".join(urlsplit(self.path).path.split("/")[1:3])
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.hub.revision(repo)}
        elif answer is None:
            headers["X-Error-Code"] = "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
        payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        for name, value in {**headers, "Content-Length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _who(self, body: bytes) -> Any:
        return {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}}

    def _create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self.hub.create(repo)
        return {"url": f"{self.hub.url}/{repo}", "id": repo}

    def _preupload(self, body: bytes, repo: str) -> Any:
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def _commit(self, body: bytes, repo: str) -> Any:
        revision = self.hub.commit(repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{revision}", "commitOid": revision}

    def _info(self, body: bytes, repo: str) -> Any:
        siblings = [{"rfilename": path} for path in self.hub.files(repo)]
        return {"id": repo, "sha": self.hub.revision(repo), "private": False, "tags": [], "siblings": siblings}

    def _tree(self, body: bytes, repo: str, folder: str) -> Any:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.hub.files(repo).items()
            if path.startswith(folder)
        ]

    def _file(self, body: bytes, repo: str, path: str) -> bytes | None:
        return self.hub.files(repo).get(path)
