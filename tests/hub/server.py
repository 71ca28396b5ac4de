"""A server on loopback that speaks as much of the Hugging Face Hub's protocol as its client needs to publish and load.

It keeps real files: contents by their hash, and each commit as a table of paths. It can be told to fail at any step.
A Space is kept under the name spaces:OWNER/NAME.
Endpoints as huggingface_hub calls them (hf_api.py, _commit_api.py, lfs.py and file_download.py there).
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".onnx")
_WHILE_SENDING = ("half", "wrong hash")  # faults of a file's content, not of the answer


@dataclass
class Repo:
    private: bool
    owner: str
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit → path → SHA-256
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, str], parent: str = "") -> str:
        oid = hashlib.sha1(json.dumps([parent, sorted(files.items()), len(self.commits)]).encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str | None:
        refs = {**self.branches, **self.tags, **self.pulls}
        return refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What to do at a step: answer with a status; 'cut' the connection; be 'slow'; send a file by 'half' or with a
    'wrong hash'."""

    status: int | str
    times: int
    message: str = ""
    seconds: float = 0.0


class Answer(Exception):
    """An answer other than the usual one."""

    def __init__(self, status: int, message: str = "", code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer(ThreadingHTTPServer):
    """The server and what it knows. `users` are names by token."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.repos: dict[str, Repo] = {}
        self.users = {"hf_ann": "ann", "hf_bob": "bob"}
        self.read_only = {"hf_reader": "ann"}
        self.faults: dict[str, Fault] = {}
        self.after_commit_cut = False  # the commit lands and its answer is lost
        self.seen: list[str] = []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, step: str, status: int | str, times: int = 10**9, message: str = "", seconds: float = 0.0) -> None:
        self.faults[step] = Fault(status, times, message, seconds)

    def mend(self) -> None:
        self.faults.clear()
        self.after_commit_cut = False
        self.seen.clear()

    def blob(self, oid: str) -> Path:
        return self.folder / oid

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.blob(oid).write_bytes(content)
        return oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        table = repo.commits[repo.resolve(revision)]
        return {path: self.blob(oid).read_bytes() for path, oid in table.items()}

    def handle_error(self, request, client_address):  # a client that went away is no news
        pass


def _new_space(name: str) -> dict[str, bytes]:
    """What a new static Space holds."""
    card = f"---\ntitle: {name.title()}\nemoji: 🐢\ncolorFrom: blue\ncolorTo: gray\nsdk: static\npinned: false\n---\n\n"
    link = "Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference\n"
    page = b'<link rel="stylesheet" href="style.css">Welcome to your static Space!\n'
    return {"README.md": (card + link).encode(), "index.html": page, "style.css": b"body { padding: 2rem }\n"}


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    _ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>.+)", "paths"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>.+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<rev>.+)", "tag"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>.+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
        ("POST", r"/lfs/verify", "verify"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "metadata"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, format, *args):
        pass

    def _serve(self):
        parts = urlsplit(re.sub(r"^/(api/)?spaces/", lambda m: f"/{'api/models/' if m[1] else ''}spaces:", self.path))
        self.query = parts.query
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(length)
        routes = (
            (step, re.fullmatch(path, parts.path)) for method, path, step in self._ROUTES if method == self.command
        )
        step, match = next(((step, match) for step, match in routes if match), ("", None))
        if match is None:
            return self._json(404, {"error": f"no such endpoint: {self.command} {parts.path}"})
        self.server.seen.append(step)
        fault = self.server.faults.get(step)
        try:
            if fault and fault.times > 0 and fault.status not in _WHILE_SENDING:
                fault.times -= 1
                if fault.status == "cut":
                    return self._cut()
                if fault.status == "slow":
                    time.sleep(fault.seconds)
                elif isinstance(fault.status, int):
                    raise Answer(fault.status, fault.message)
            with self.server.lock:
                arguments = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                getattr(self, f"_{step}")(**arguments)
        except Answer as answer:
            self._json(answer.status, {"error": answer.message}, answer.message, answer.code)
        return None

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, status: int, content, message: str = "", code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if message:
            self.send_header("X-Error-Message", message)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _user(self, write: bool = True) -> str | None:
        token = self._token()
        user = self.server.users.get(token) or self.server.read_only.get(token)
        if token and not user:
            raise Answer(401, "Invalid credentials in Authorization header")
        if write and not user:
            raise Answer(401, "Invalid username or password.")
        if write and token in self.server.read_only:
            raise Answer(403, "your token has no write access")
        return user

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self._user(write)
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            raise Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repo.owner:
            raise Answer(403, "You don't have the rights to write to this repository")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def _whoami(self):
        role = "read" if self._token() in self.server.read_only else "write"
        token = {"displayName": "a token", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
        self._json(200, {"type": "user", "name": self._user(write=False), "orgs": [], "auth": {"accessToken": token}})

    # Publishing

    def _create(self):
        user = self._user()
        asked = json.loads(self.body)
        owner = asked.get("organization") or user
        if owner != user:
            raise Answer(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        space = asked.get("type") == "space"
        if space and asked.get("sdk") != "static":
            raise Answer(400, "a Space needs an sdk; this server has static ones")
        url = f"{self.server.url}/{'spaces/' if space else ''}{owner}/{asked['name']}"
        repo_id = f"{'spaces:' if space else ''}{owner}/{asked['name']}"
        if repo_id in self.server.repos:
            return self._json(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        repo = self.server.repos[repo_id] = Repo(private, owner)
        files = {".gitattributes": b"*.safetensors filter=lfs\n", **(_new_space(asked["name"]) if space else {})}
        repo.branches["main"] = repo.add({path: self.server.store(content) for path, content in files.items()})
        return self._json(200, {"url": url, "name": repo_id, "id": repo_id})

    def _validate(self):
        content = json.loads(self.body)["content"]
        try:
            header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            metadata = yaml.safe_load(header[1]) if header else None
            errors = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
            if not errors and json.loads(self.body).get("repoType") == "space" and metadata.get("sdk") != "static":
                errors.append({"message": '"sdk" must be one of [gradio, docker, static]'})
            if not errors and not isinstance(metadata.get("license"), str):
                errors.append({"message": '"license" must be a string'})
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def _repo_to_change(self, repo_id: str) -> Repo:
        """Whoever may read a repository may open a pull request."""
        pull_request = "create_pr=1" in self.query
        if pull_request:
            self._user()
        return self._repo(repo_id, write=not pull_request)

    def _preupload(self, repo, rev):
        stored = self._repo_to_change(repo)
        table = stored.commits[self._commit_of(stored, rev)]
        out = []
        for file in json.loads(self.body)["files"]:
            oid = table.get(file["path"])
            lfs = _is_lfs(file["path"])
            if oid and not lfs:
                oid = _git_oid(self.server.blob(oid).read_bytes())
            mode = "lfs" if lfs else "regular"
            out.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json(200, {"files": out})

    def _batch(self, repo):
        self._user()
        self._repo(repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = None  # it is here already
            if not self.server.blob(item["oid"]).exists():
                signed = f"{self.server.url}/lfs/{item['oid']}?X-Signature=secret"
                actions = {"upload": {"href": signed}, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append({**item, "authenticated": True, **({"actions": actions} if actions else {})})
        self._json(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "the content has another hash")
        self.server.blob(f"{oid}.unverified").write_bytes(self.body)
        self._json(200, {})

    def _verify(self):
        asked = json.loads(self.body)
        blob = self.server.blob(f"{asked['oid']}.unverified")
        if not blob.exists() or blob.stat().st_size != asked["size"]:
            raise Answer(404, "no such object")
        blob.rename(self.server.blob(asked["oid"]))
        self._json(200, {})

    def _commit(self, repo, rev):
        stored = self._repo_to_change(repo)
        head = self._commit_of(stored, rev)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head):
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(stored.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not self.server.blob(value["oid"]).exists():
                    raise Answer(400, f"the object of {value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = stored.add(files, head)
        page = repo.replace(":", "/")
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{page}/commit/{oid}"}
        if "create_pr=1" in self.query:
            number = len(stored.pulls) + 1
            stored.pulls[f"refs/pr/{number}"] = oid
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        else:
            stored.branches[rev] = oid
        if self.server.after_commit_cut:
            self.server.after_commit_cut = False
            return self._cut()
        return self._json(200, answer)

    def _branch(self, repo, rev):
        stored = self._repo(repo, write=True)
        if rev in stored.branches:
            raise Answer(409, "Reference already exists")
        stored.branches[rev] = stored.branches["main"]
        self._json(200, {})

    def _tag(self, repo, rev):
        stored = self._repo(repo, write=True)
        name = json.loads(self.body)["tag"]
        if name in stored.tags:
            raise Answer(409, "Tag reference exists already")
        stored.tags[name] = self._commit_of(stored, rev)
        self._json(200, {})

    # Reading

    def _refs(self, repo):
        stored = self._repo(repo)

        def refs(kind, table):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in table.items()]

        self._json(200, {"branches": refs("heads", stored.branches), "tags": refs("tags", stored.tags), "converts": []})

    def _info(self, repo, rev="main"):
        stored = self._repo(repo)
        oid = self._commit_of(stored, rev)
        siblings = [{"rfilename": path} for path in stored.commits[oid]]
        self._json(200, {"id": repo, "sha": oid, "private": stored.private, "siblings": siblings, "tags": []})

    def _paths(self, repo, rev):
        stored = self._repo(repo)
        table = stored.commits[self._commit_of(stored, rev)]
        out = []
        for path in parse_qs(self.body.decode())["paths"]:
            if path in table:
                content = self.server.blob(table[path]).read_bytes()
                out.append({"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)})
                if _is_lfs(path):
                    out[-1]["lfs"] = {"oid": table[path], "size": len(content), "pointerSize": 130}
        self._json(200, out)

    def _content(self, repo, rev, path) -> tuple[str, str, bytes]:
        stored = self._repo(repo)
        commit = self._commit_of(stored, rev)
        oid = stored.commits[commit].get(path)
        if oid is None:
            raise Answer(404, "Entry not found", "EntryNotFound")
        return commit, oid, self.server.blob(oid).read_bytes()

    def _file_headers(self, commit: str, path: str, oid: str, content: bytes):
        self.send_header("X-Repo-Commit", commit)
        etag = oid if _is_lfs(path) else _git_oid(content)
        self.send_header("ETag", f'"{etag}"')
        if _is_lfs(path):
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")

    def _metadata(self, repo, rev, path):
        commit, oid, content = self._content(repo, rev, path)
        self.send_response(200)
        self._file_headers(commit, path, oid, content)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def _resolve(self, repo, rev, path):
        commit, oid, content = self._content(repo, rev, path)
        fault = self.server.faults.get("resolve")
        if fault and fault.status == "wrong hash" and _is_lfs(path):
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        self._file_headers(commit, path, oid, content)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if fault and fault.status == "half" and fault.times > 0 and _is_lfs(path):
            fault.times -= 1
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.wfile.flush()
            return self._cut()
        self.wfile.write(content[start:])
        return None
