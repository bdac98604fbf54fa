"""A local stand-in for the Hub: as much of its HTTP API as huggingface_hub needs to push and to load a model.

Files are stored as on the Hub: large ones by their hash before a commit (Git LFS), small ones in the commit. It does
not speak Xet.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
READ_ONLY = "hf_readonly"
_LARGE = (".safetensors", ".mp4", ".png")


class Repo:
    def __init__(self, private):
        self.private, self.commits, self.branches = private, {}, {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch, files):
        parent = self.branches.get(branch, "")
        sha = hashlib.sha1(repr((parent, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision):
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """What the stand-in has: repositories, stored objects, paths of requests, and what is to fail."""

    def __init__(self):
        self.repos, self.objects, self.requests = {}, {}, []
        self.fail, self.cards = None, []

    def puts(self):
        return [path for method, path in self.requests if method == "PUT"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None, message="refused"):
        self.answer(status, {"error": message}, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    def handle_any(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_ONLY) and "/lfs/" not in path:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif self.hub.fail is not None and re.search(self.hub.fail, f"{self.command} {path}"):
            self.refuse(500, message="the stand-in fails")
        else:
            for pattern, action in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    action(self, token, body, *match.groups())
                    return
            self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def repo_for(self, name, token, *, writes=False):
        """The repository; None after an answer if the token may not."""
        repo = self.hub.repos.get(name)
        if writes and token == READ_ONLY:
            self.refuse(403)
        elif repo is None or (repo.private and not token):
            self.refuse(404, "RepoNotFound")
        else:
            return repo
        return None

    def create(self, token, body):
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}"
        if token == READ_ONLY:
            self.refuse(403)
        elif name in self.hub.repos:
            self.refuse(409)
        else:
            self.hub.repos[name] = Repo(given.get("visibility") == "private" or given.get("private") is True)
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})

    def info(self, token, _body, name, revision=None):
        if repo := self.repo_for(name, token):
            files = repo.files(revision or "main")
            if files is None:
                self.refuse(404, "RevisionNotFound")
            else:
                sha = repo.branches.get(revision or "main", revision)
                siblings = [{"rfilename": file} for file in sorted(files)]
                self.answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, token, _body, name, revision):
        if repo := self.repo_for(name, token):
            entries = []
            for path, content in sorted(repo.files(revision).items()):
                data = self.hub.objects[content] if isinstance(content, str) else content
                lfs = {"oid": content, "size": len(data), "pointerSize": 130} if isinstance(content, str) else None
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                entries.append(entry | ({"lfs": lfs} if lfs else {}))
            self.answer(200, entries)

    def branch(self, token, body, name, branch):
        if repo := self.repo_for(name, token, writes=True):
            repo.branches[branch] = repo.branches[json.loads(body or b"{}").get("startingPoint") or "main"]
            self.answer(201)

    def validate(self, _token, body):
        self.hub.cards.append(json.loads(body)["content"])
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, token, body, name, revision):
        if repo := self.repo_for(name, token, writes=True):
            files = repo.files(revision)
            modes = []
            for file in json.loads(body)["files"]:
                content = files.get(file["path"])
                oid = git_hash(content) if isinstance(content, bytes) else content
                mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": modes})

    def batch(self, token, body, name):
        if self.repo_for(name, token, writes=True):
            host = self.headers["Host"]
            objects = []
            for entry in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"http://{host}/lfs/{entry['oid']}"}}
                objects.append(entry if entry["oid"] in self.hub.objects else entry | {"actions": upload})
            self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, _token, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(200)

    def commit(self, token, body, name, branch):
        if repo := self.repo_for(name, token, writes=True):
            files = dict(repo.files(branch))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit") not in (None, repo.branches[branch]):
                    return self.refuse(412)
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    assert value["oid"] in self.hub.objects
                    files[value["path"]] = value["oid"]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repo.commit(branch, files)
            url = f"http://{self.headers['Host']}/{name}/commit/{sha}"
            self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})
        return None

    def resolve(self, token, _body, name, revision, path):
        if repo := self.repo_for(name, token):
            content = (repo.files(revision) or {}).get(path)
            if content is None:
                return self.refuse(404, "EntryNotFound")
            data = self.hub.objects[content] if isinstance(content, str) else content
            etag = f'"{content if isinstance(content, str) else git_hash(content)}"'
            sha = repo.branches.get(revision, revision)
            self.answer(200, data, ETag=etag, X_Repo_Commit=sha, X_Linked_Etag=etag, X_Linked_Size=str(len(data)))
        return None


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (rf"GET /api/models/{_NAME}", Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    (rf"POST /api/models/{_NAME}/branch/(.+)", Handler.branch),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.store),
    (rf"POST /api/models/{_NAME}/commit/(.+)", Handler.commit),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def git_hash(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def hub_server():
    """Yield the address of a running stand-in and what it has."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
