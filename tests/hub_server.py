"""A Hub on a loopback port: the endpoints that pushing and loading need, kept in memory, with faults on demand.

    with HubServer() as hub:
        hub.fail("POST .*/commit/", 500)
        HfApi(endpoint=hub.url, token=OWNER).create_repo("org/model")

As on the real Hub, a commit is all or nothing, large files travel ahead of it, private repositories do not exist for
strangers, and every repository starts with one commit that holds a .gitattributes file.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"
# Name and role behind each token.
TOKENS = {OWNER: ("org", "write"), READER: ("org", "read"), STRANGER: ("someone", "write")}
LARGE = ("*.safetensors", "*.png")
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refusal(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict


@dataclass
class Repo:
    kind: str
    name: str
    private: bool = False
    gated: object = False
    sdk: object = None
    commits: list = field(default_factory=list)
    branches: dict = field(default_factory=dict)

    def commit(self, branch, message, files):
        count = len(self.commits)
        oid = hashlib.sha1(f"{self.kind} {self.name} {count} {branch} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision):
        oid = self.branches.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @property
    def files(self):
        return self.at("main").files


@dataclass
class Fault:
    pattern: str
    action: object
    times: int


class HubServer:
    """Attributes: url; repos by (kind, name); blobs by SHA-256; log of "METHOD path" in order of arrival."""

    def __init__(self):
        self.repos, self.blobs, self.log, self.faults = {}, {}, [], []
        self.lock, self.released = threading.RLock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        # Stalled requests must not hold up the end of a test.
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, pattern, action, times=1):
        """Let the next requests whose "METHOD path" match fail: a status, "stall", or "cut" amid the body."""
        self.faults.append(Fault(pattern, action, times))

    def fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault.times and re.match(fault.pattern, request):
                    fault.times -= 1
                    return fault.action
        return None

    def model(self, name):
        return self.repos["model", name]

    def requests(self, pattern):
        return [index for index, request in enumerate(self.log) if re.match(pattern, request)]


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path):
    return any(fnmatch(path, pattern) for pattern in LARGE)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:
            # The client went away.
            self.close_connection = True

    def do_POST(self):
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.log.append(request)
        fault = self.hub.fault(request)
        if fault == "stall":
            self.hub.released.wait(60)
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self._body(length)
        try:
            if isinstance(fault, int):
                raise Refusal(fault, f"fault {fault}")
            with self.hub.lock:
                self._route(unquote(path))
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_PUT = do_POST

    def _body(self, length):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content=b"", status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path):
        routes = [
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda: self._answer({"errors": [], "warnings": []})),
            (r"POST /(spaces/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /lfs/(?P<oid>\w+)", self._upload),
            (r"PUT /api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)/settings", self._settings),
            (r"POST /api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>.+)", self._branch),
            (r"POST /api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self._preupload),
            (r"POST /api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>.+)", self._commit),
            (r"GET /api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self._tree),
            (r"GET /api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", self._info),
            (
                r"(GET|HEAD) /(?P<space>spaces/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
                self._file,
            ),
        ]
        for pattern, action in routes:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(**match.groupdict())
        raise Refusal(404, f"no such endpoint: {self.command} {path}")

    def _user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, None))

    def _whoami(self):
        user, _ = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self._answer({"name": user, "type": "user", "orgs": []})

    def _repo(self, kind, name, write=False):
        user, _ = self._user()
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._demand_write(name.split("/")[0])
        return repo

    def _demand_write(self, namespace):
        user, role = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != namespace or role != "write":
            raise Refusal(403, f"You don't have the rights to write to {namespace}")

    def _create(self):
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or self._user()[0] or "nobody"
        kind, name = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
        self._demand_write(namespace)
        url = f"{self.hub.url}/{'spaces/' if kind == 'space' else ''}{name}"
        if (kind, name) in self.hub.repos:
            return self._answer({"error": "You already created this repo", "url": url}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        repo = self.hub.repos[kind, name] = Repo(kind, name, private, sdk=wanted.get("sdk"))
        repo.commit("main", "initial commit", {".gitattributes": GIT_ATTRIBUTES})
        return self._answer({"url": url})

    def _settings(self, kind, name):
        repo, wanted = self._repo(kind, name, write=True), json.loads(self.body)
        repo.gated = wanted.get("gated", repo.gated)
        repo.private = {"private": True, "public": False}.get(
            wanted.get("visibility"), wanted.get("private", repo.private)
        )
        self._answer({})

    def _branch(self, kind, name, branch):
        repo = self._repo(kind, name, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._answer({})

    def _info(self, kind, name, revision):
        repo = self._repo(kind, name)
        commit = repo.at(revision or "main")
        answer = {
            "id": name,
            "sha": commit.oid,
            "private": repo.private,
            "gated": repo.gated,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        self._answer(answer)

    def _tree(self, kind, name, revision):
        files = self._repo(kind, name).at(revision).files
        entries = []
        for path, data in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._answer(entries)

    def _preupload(self, kind, name, revision):
        wanted = json.loads(self.body)
        there = self._repo(kind, name, write=True).at(revision).files
        ignored = (wanted.get("gitIgnore") or there.get(".gitignore", b"").decode()).split("\n")
        answer = []
        for file in wanted["files"]:
            path, data = file["path"], there.get(file["path"])
            large = is_large(path)
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_oid(data)
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": any(fnmatch(path, pattern) for pattern in ignored if pattern),
                    "oid": oid,
                }
            )
        self._answer({"files": answer})

    def _batch(self, name):
        self._demand_write(name.split("/")[0])
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def _upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "content does not match its digest")
        self.hub.blobs[oid] = self.body
        self._answer()

    def _commit(self, kind, name, revision):
        repo = self._repo(kind, name, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent not in (None, repo.at(revision).oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(revision).files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del files[value["path"]]
        commit = repo.commit(revision, header["value"]["summary"], files)
        self._answer({"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"})

    def _file(self, space, name, revision, file):
        repo = self._repo("space" if space else "model", name)
        commit = repo.at(revision)
        if repo.gated and self._user()[0] != name.split("/")[0]:
            raise Refusal(403, f"Access to model {name} is restricted", "GatedRepo")
        if file not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[file]
        etag = hashlib.sha256(data).hexdigest() if is_large(file) else git_oid(data)
        self._answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid})
