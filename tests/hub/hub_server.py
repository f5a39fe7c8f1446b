"""A small Hugging Face Hub on loopback: enough of its protocol for the real client to push and pull.

    with HubServer() as hub:                        # one account, ME, whose token is TOKEN
        hub.fail("PUT /lfs/", "drop", times=2)      # the next two such requests lose their connection
        HfApi(endpoint=hub.url, token=TOKEN).upload_folder(...)
        hub.repos["model", "me/name"].files["README.md"]

Everything is held in memory and bounded: a body of at most MOST_BYTES, ten seconds for a read. It speaks
LFS and not Xet, whose storage is another service: clients need HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

ME = "me"
TOKEN = "hf_" + "loopbackloopbackloopback"  # in two parts, so that no scanner takes it for a real one
MOST_BYTES = 64 << 20
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        content = "".join(f"{path}{git_oid(data)}" for path, data in sorted(self.files.items()))
        return hashlib.sha1(f"{self.commits}{content}".encode()).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {("model", "me/public"): Repo(private=False)}
        self.lfs: dict[str, bytes] = {}  # by SHA-256
        self.role = "write"  # of TOKEN
        self.requests: list[str] = []  # "METHOD /path status"
        self.faults: list[list] = []  # [beginning of "METHOD /path", what, times left, headers]
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, request: str, what: int | str, times: int = 1, **headers: str) -> None:
        """Answer the next requests that begin so with a status, or "drop" the connection in the middle."""
        self.faults.append([request, what, times, {k.replace("_", "-"): v for k, v in headers.items()}])

    def count(self, beginning: str) -> int:
        return sum(request.startswith(beginning) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: HubServer

    def log_message(self, *_arguments) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_POST = do_PUT = do_HEAD = do_GET

    def handle_one(self) -> None:
        place = urlsplit(self.path)
        self.query = parse_qs(place.query)
        asked = f"{self.command} {unquote(place.path)}"
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BYTES:
            return self.answer(413, {"error": "too large"})
        with self.server.lock:
            fault = next((f for f in self.server.faults if asked.startswith(f[0]) and f[2] > 0), None)
            if fault:
                fault[2] -= 1
        if fault and fault[1] == "drop":
            self.rfile.read(length // 2)
            self.server.requests.append(f"{asked} dropped")
            self.close_connection = True
            return self.connection.close()
        self.body = self.rfile.read(length) if length else self.read_chunked()
        if fault:
            return self.answer(fault[1], {"error": "failure requested by the test"}, fault[3])
        with self.server.lock:
            self.route(unquote(place.path).strip("/").split("/"))

    def read_chunked(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return body
        while size := int(self.rfile.readline(), 16):
            if len(body) + size > MOST_BYTES:
                break
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content=None, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)} {status}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- The protocol --------------------------------------------------------------------------------------

    def route(self, parts: list[str]) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self.answer(
                401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"}
            )
        self.known = bool(token)
        if parts[0] == "lfs":
            return self.lfs(parts[1])
        if parts == ["api", "whoami-v2"]:
            auth = {"type": "access_token", "accessToken": {"role": self.server.role}}
            return (
                self.answer(200, {"name": ME, "type": "user", "orgs": [], "auth": auth})
                if token
                else self.answer(401, {})
            )
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(self.body))
        if parts[0] == "api" and parts[1] in ("models", "datasets", "spaces") and len(parts) >= 4:
            kind, name, rest = parts[1][:-1], "/".join(parts[2:4]), parts[4:]
        else:
            kind = {"datasets": "dataset", "spaces": "space"}.get(parts[0], "model")
            parts = parts[kind != "model" :]
            name, rest = "/".join(parts[:2]), ["files", *parts[2:]]
        repo = self.server.repos.get((kind, name.removesuffix(".git")))
        if repo is None or (repo.private and not self.known):
            return self.answer(404 if self.known else 401, {}, {"X-Error-Code": "RepoNotFound"})
        self.repo(kind, name, repo, rest or ["revision", "main"])

    def create(self, asked: dict) -> None:
        owner = asked.get("organization") or ME
        kind, name = asked.get("type", "model"), f"{owner}/{asked['name']}"
        if not self.known or owner != ME:
            return self.answer(403 if self.known else 401, {"error": "You may not write there"})
        if kind == "space" and not asked.get("sdk"):
            return self.answer(400, {"error": "sdk is required"})
        prefix = "datasets/" if kind == "dataset" else ""
        url = {"url": f"{self.server.url}/{prefix}{name}", "name": name}
        if (kind, name) in self.server.repos:
            return self.answer(409, {"error": "You already created this repo", **url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repos[kind, name] = Repo(private, {".gitattributes": b"*.png filter=lfs\n"})
        self.answer(200, url)

    def lfs(self, oid: str) -> None:
        if oid == "verify":
            upload = json.loads(self.body)
            whole = len(self.server.lfs.get(upload["oid"], b"")) == upload["size"]
            return self.answer(200 if whole else 404, {})
        if sha256(self.body) != oid:
            return self.answer(400, {"error": "SHA-256 does not match"})
        self.server.lfs[oid] = self.body
        self.answer(200, {})

    def repo(self, kind: str, name: str, repo: Repo, rest: list[str]) -> None:
        what, path = rest[0], "/".join(rest[2:])
        if what in ("revision", "tree", "files") and self.command in ("GET", "HEAD"):
            revision = rest[2] if what == "files" else rest[1]
            if revision not in ("main", repo.sha):
                return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            info = {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []}
            self.answer(200, info | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})
        elif what == "tree":
            self.answer(200, self.entries(repo, path, "true" in str(self.query.get("recursive")).lower()))
        elif what == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            entries = self.entries(repo, "", True)
            self.answer(200, [entry for entry in entries if entry["path"] in wanted])
        elif what == "preupload":
            files = json.loads(self.body)["files"]
            self.answer(200, {"files": [self.upload_mode(repo, file["path"]) for file in files]})
        elif what == "commit":
            self.commit(kind, name, repo)
        elif what == "files" and rest[1:] == ["info", "lfs", "objects", "batch"]:
            self.batch()
        elif what == "files" and rest[1] == "resolve":
            self.resolve(repo, "/".join(rest[3:]))
        else:
            self.answer(404, {"error": f"no {what} here"})

    def entries(self, repo: Repo, folder: str, recursive: bool) -> list[dict]:
        files, folders = [], set()
        for path, data in sorted(repo.files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            parts = path.removeprefix(f"{folder}/").split("/")
            depths = range(1, len(parts)) if recursive else range(1, min(2, len(parts)))
            start = [folder] if folder else []
            folders |= {"/".join([*start, *parts[:depth]]) for depth in depths}
            if not recursive and len(parts) > 1:
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            files.append(entry)
        return files + [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)
        ]

    def upload_mode(self, repo: Repo, path: str) -> dict:
        large = path.endswith(LFS_SUFFIXES)
        data = repo.files.get(path)
        oid = None if data is None else sha256(data) if large else git_oid(data)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            if one["oid"] not in self.server.lfs:
                upload, verify = f"{self.server.url}/lfs/{one['oid']}", f"{self.server.url}/lfs/verify"
                one["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(one)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, kind: str, name: str, repo: Repo) -> None:
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repo.files[value["path"]] = self.server.lfs[value["oid"]]
            elif key == "deletedFile":
                repo.files.pop(value["path"])
        repo.commits += 1
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}/commit/{repo.sha}"
        self.answer(200, {"success": True, "commitOid": repo.sha, "commitUrl": url, "pullRequestUrl": None})

    def resolve(self, repo: Repo, path: str) -> None:
        if path not in repo.files:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha})
        data = repo.files[path]
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{git_oid(data)}"'}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        self.answer(200, data, headers)
