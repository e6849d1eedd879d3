"""A Hub on this machine: the HTTP endpoints of huggingface.co that huggingface_hub calls, with repositories in memory.

Small text files travel inside commits, weights through Git LFS. Xet is no part of it: the client chooses it whenever
hf_xet is installed, so ``HF_HUB_DISABLE_XET`` has to be set. ``HF_ENDPOINT`` is read when huggingface_hub is imported;
use ``HubServer.environment`` for a process of its own, ``HubServer.use`` for this one.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from hub_rules import commit_files, is_large, metadata_errors

USER = "tester"
WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read"}

HANG_UP = 0
"""Instead of a status: the connection ends before anything is done."""

LOSE = -1
"""Instead of a status: everything is done, but the connection ends before the answer."""

Files = dict[str, bytes]


@dataclass(frozen=True)
class Commit:
    title: str
    files: Files
    oid: str


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    """Branch, or ``refs/pr/1`` and so on -> its commits, the newest last."""

    def commit_at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit.oid == revision), None)

    def add(self, branch: str, title: str, files: Files) -> Commit:
        number = sum(map(len, self.branches.values()))
        oid = hashlib.sha1(f"{id(self)} {branch} {number}".encode()).hexdigest()
        self.branches.setdefault(branch, []).append(Commit(title, files, oid))
        return self.branches[branch][-1]


@dataclass(frozen=True)
class RefusalError(Exception):
    """An answer other than 200."""

    status: int
    code: str = ""
    message: str = ""
    body: Any = None


class HubServer:
    """What the server knows; safe to read while it runs."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        """sha256 -> contents of files that came through LFS."""
        self.faults: list[tuple[str, int]] = []
        """(pattern of a request such as ``"POST .*/commit/.*"``, status), each used once; see ``HANG_UP``, ``LOSE``."""
        self.requests: list[str] = []
        self.url = ""

    def commits(self, repo: str, branch: str = "main") -> list[Commit]:
        """Return the commits of a branch, the newest last, without the empty one that made the repository."""
        with self.lock:
            return self.repositories[repo].branches[branch][1:]

    def files(self, repo: str, branch: str = "main") -> Files:
        """Return the newest files by path."""
        with self.lock:
            return dict(self.repositories[repo].branches[branch][-1].files)

    def environment(self, home: Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Return the environment variables of a process that is to use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, token: str | None = WRITE_TOKEN) -> None:
        """Make huggingface_hub in this process use this Hub."""
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token or "")


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a Hub in a thread."""
    hub = HubServer()
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


REPO = r"([^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(
            {
                r"/api/whoami-v2": self._who,
                rf"/api/models/{REPO}": self._info,
                rf"/api/models/{REPO}/revision/([^/]+)": self._info,
                rf"/api/models/{REPO}/refs": self._refs,
                rf"/api/models/{REPO}/tree/([^/]+)/?(.*)": self._tree,
                rf"/{REPO}/resolve/([^/]+)/(.+)": self._file,
                r"/large/([0-9a-f]+)": self._large,
            }
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._answer(
            {
                r"/api/repos/create": self._create,
                r"/api/validate-yaml": self._validate,
                rf"/api/models/{REPO}/branch/([^/]+)": self._branch,
                rf"/api/models/{REPO}/preupload/([^/]+)": self._preupload,
                rf"/api/models/{REPO}/commit/([^/]+)": self._commit,
                rf"/{REPO}\.git/info/lfs/objects/batch": self._batch,
                r"/large/verify": self._verify,
            }
        )

    def do_PUT(self) -> None:
        self._answer({r"/large/([0-9a-f]+)": self._store})

    def _answer(self, routes: dict[str, Callable[..., Any]]) -> None:
        self.body = self._read()
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        fault = self._fault()
        if fault is not None and fault != LOSE:
            return self._hang_up() if fault == HANG_UP else self._send(RefusalError(fault, message="something broke"))
        for pattern, action in routes.items():
            found = re.fullmatch(pattern, path)
            if found:
                try:
                    with self.hub.lock:
                        answer = action(*map(unquote, found.groups()))
                    return self._hang_up() if fault == LOSE else self._send(answer)
                except RefusalError as refusal:
                    return self._send(refusal)
        return self._send(RefusalError(404, message=f"no endpoint {self.command} {path}"))

    def _fault(self) -> int | None:
        for pattern, status in list(self.hub.faults):
            if re.fullmatch(pattern, self.hub.requests[-1]):
                self.hub.faults.remove((pattern, status))
                return status
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Any) -> None:
        """Send JSON, (headers, bytes) or a refusal."""
        status, headers, payload = 200, {"Content-Type": "application/json"}, b""
        if isinstance(answer, RefusalError):
            status = answer.status
            headers |= {"X-Error-Code": answer.code} if answer.code else {}
            headers |= {"X-Error-Message": answer.message} if answer.message else {}
            payload = json.dumps(answer.body or {"error": answer.message or answer.code}).encode()
        elif isinstance(answer, tuple):
            headers, payload = answer
            status = 302 if "Location" in headers else 200
        else:
            payload = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _role(self) -> str | None:
        """Return what the caller may do; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ROLES:
            raise RefusalError(401, message="Invalid credentials in Authorization header")
        return ROLES.get(token)

    def _may_write(self, owner: str) -> None:
        role = self._role()
        if role is None:
            raise RefusalError(401, message="Invalid username or password.")
        if role != "write" or owner != USER:
            raise RefusalError(403, message="You don't have the required permissions")

    def _repository(self, name: str) -> Repository:
        """Return a repository that the caller may see."""
        role, found = self._role(), self.hub.repositories.get(name)
        if found is None or (found.private and role is None):
            raise RefusalError(401 if role is None else 404, "RepoNotFound", "Repository not found")
        return found

    def _at(self, name: str, revision: str) -> Commit:
        found = self._repository(name).commit_at(revision)
        if found is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _who(self) -> Any:
        if self._role() is None:
            raise RefusalError(401, message="Invalid username or password.")
        return {"type": "user", "name": USER, "auth": {"accessToken": {"role": self._role()}}}

    def _create(self) -> Any:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "id": name}
        self._may_write(owner)
        if name in self.hub.repositories:
            raise RefusalError(409, body={**answer, "error": "You already created this model repo"})
        self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.hub.repositories[name].add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return answer

    def _validate(self) -> Any:
        errors = metadata_errors(json.loads(self.body)["content"])
        if errors:
            raise RefusalError(400, body={"errors": [{"message": error} for error in errors], "warnings": []})
        return {"errors": [], "warnings": []}

    def _info(self, name: str, revision: str = "main") -> Any:
        commit, repository = self._at(name, revision), self._repository(name)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.oid, "private": repository.private, "tags": [], "siblings": siblings}

    def _refs(self, name: str) -> Any:
        branches = {b: commits[-1].oid for b, commits in self._repository(name).branches.items() if "/pr/" not in b}
        found = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches.items()]
        return {"branches": found, "tags": [], "converts": [], "pullRequests": []}

    def _tree(self, name: str, revision: str, folder: str) -> Any:
        found = []
        for path, data in self._at(name, revision).files.items():
            if path.startswith(folder):
                entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
                large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                found.append(entry | ({"lfs": large} if is_large(path) else {}))
        return found

    def _branch(self, name: str, branch: str) -> Any:
        repository = self._repository(name)
        self._may_write(name.split("/")[0])
        if branch in repository.branches:
            raise RefusalError(409, message="Reference already exists")
        start = self._at(name, json.loads(self.body or b"{}").get("startingPoint", "main"))
        repository.branches[branch] = [start]
        return {}

    def _preupload(self, name: str, revision: str) -> Any:
        files, found = self._at(name, revision).files, []
        self._may_write(name.split("/")[0] if "create_pr" not in self.query else USER)
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            answer = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = hashlib.sha256(files[path]).hexdigest() if is_large(path) else _git_hash(files[path])
            found.append(answer)
        return {"files": found}

    def _commit(self, name: str, revision: str) -> Any:
        repository, before = self._repository(name), self._at(name, revision)
        asks = "create_pr" in self.query
        self._may_write(name.split("/")[0] if not asks else USER)
        if revision not in repository.branches:
            raise RefusalError(400, message="a commit goes to a branch")
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        files = commit_files(before.files, lines, self.hub.large)
        if isinstance(files, str):
            raise RefusalError(400, message=files)
        title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        number = sum("/pr/" in branch for branch in repository.branches) + 1
        made = repository.add(f"refs/pr/{number}" if asks else revision, title, files)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if asks else {})

    def _batch(self, name: str) -> Any:
        self._repository(name)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.hub.url}/large/verify"}
            answers.append(wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": actions})
        return {"transfer": "basic", "objects": answers}

    def _store(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, message="these are other bytes")
        self.hub.large[oid] = self.body
        return {}

    def _verify(self) -> Any:
        wanted = json.loads(self.body)
        if len(self.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusalError(404, message="not there")
        return {}

    def _file(self, name: str, revision: str, path: str) -> Any:
        commit = self._at(name, revision)
        if path not in commit.files:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        data = commit.files[path]
        headers = {"ETag": f'"{_git_hash(data)}"', "X-Repo-Commit": commit.oid}
        if not is_large(path):
            return headers, data
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        # Elsewhere, as on the Hub: the client follows what redirects to the same host at once.
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        return {**headers, **linked, "Location": f"{elsewhere}/large/{oid}"}, b""

    def _large(self, oid: str) -> Any:
        if oid not in self.hub.large:
            raise RefusalError(404, "EntryNotFound")
        return {"ETag": f'"{oid}"'}, self.hub.large[oid]


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
