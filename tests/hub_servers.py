"""Stand-ins for the two hubs on a loopback port: enough of their interfaces for the real clients to fetch a directory,
and to upload one.

What is answered follows the clients' own source (huggingface_hub 1.33, modelscope-hub 0.5): revision, tree and `resolve`
of the one; `repo/files` and `repo` of the other. Uploads are git LFS batches and a commit on both; Hugging Face's newer
transfer (xet) is a protocol of its own that is not spoken here, so its client must be told HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, what was asked of it, and how it misbehaves."""

    repository: str
    files: Mapping[str, bytes]
    cut: dict[str, int] = field(default_factory=dict)  # the next answer with this file ends after so many bytes
    down_after_cut: bool = False  # and then the hub hangs up on everyone until `mend`
    down: bool = False
    sent: list[tuple[str, int]] = field(default_factory=list)  # file and first byte of each answer with content
    endpoint: str = ""
    token: str = "secret-token"  # what uploads must bring
    exists: bool = True  # false: uploads must make the repository first
    private: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)  # uploaded, by sha256
    committed: dict[str, bytes] = field(default_factory=dict)  # by path

    def mend(self) -> None:
        self.cut.clear()
        self.down_after_cut = self.down = False


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    timeout = 10

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.down:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        path, query = unquote(url.path), {name: values[0] for name, values in parse_qs(url.query).items()}
        modelscope = f"/api/v1/models/{self.hub.repository}/"
        if path == modelscope + "repo/files":
            self._modelscope_tree(query["Revision"])
        elif path == modelscope + "repo":
            self._file(query["FilePath"])
        elif self.hub.exists and path == f"/openapi/v1/models/{self.hub.repository}":
            self._json(200, {"success": True, "data": {"private": self.hub.private}})
        elif path.startswith(("/api/v1/", "/openapi/v1/")):
            self._json(404, {"Code": 10010205001, "Message": "model not found", "Success": False})
        else:
            self._huggingface(path)

    def do_PUT(self) -> None:
        data = self._body()
        name = hashlib.sha256(data).hexdigest()
        if self.path != f"/blobs/{name}":
            self._json(400, {"error": "another hash"})
            return
        self.hub.blobs[name] = data
        self._json(200, {})

    def do_POST(self) -> None:
        data = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and self.hub.token not in str(
            self.headers.get("Cookie")
        ):
            self._json(401, {"error": "Invalid token", "Code": 10010205001, "Message": "invalid token", "Success": False})
            return
        path, name = urlsplit(self.path).path, self.hub.repository
        if path in ("/api/repos/create", "/api/v1/models"):
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self._json(200, {"warnings": [], "errors": []})
        elif path == f"/api/models/{name}/preupload/main":
            rows = [
                {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(data)["files"]
            ]
            self._json(200, {"files": rows})
        elif path in (f"/{name}.git/info/lfs/objects/batch", f"/api/v1/repos/models/{name}/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(data)["objects"], wrapped=path.startswith("/api/v1"))
        elif path == f"/api/models/{name}/commit/main":
            for one in (json.loads(line) for line in data.splitlines()):
                if one["key"] != "header":
                    value = one["value"]
                    self._commit(value["path"], value.get("content"), value.get("oid"))
            self._json(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        elif path == f"/api/v1/repos/models/{name}/commit/master":
            for one in json.loads(data)["actions"]:
                self._commit(one["path"], one["content"] or None, one["sha256"])
            self._json(200, {"Code": 200, "Success": True, "Data": {"oid": COMMIT}})
        else:
            self._json(404, {"error": f"nothing at {path}"})

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.hub.exists:
            self._json(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/x/y"})
            return
        self.hub.exists = True
        self.hub.private = wanted.get("visibility") == "private" or wanted.get("Visibility") == 1
        row = {"url": f"{self.hub.endpoint}/{self.hub.repository}", "name": self.hub.repository}
        self._json(200, row | {"Code": 200, "Success": True, "Data": {}})

    def _lfs_batch(self, objects: list[dict[str, Any]], *, wrapped: bool) -> None:
        rows = [
            one | {"actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{one['oid']}", "header": {}}}}
            for one in objects
        ]
        self._json(200, {"Code": 200, "Success": True, "Data": {"objects": rows}} if wrapped else {"objects": rows})

    def _commit(self, path: str, content: str | None, oid: str | None) -> None:
        self.hub.committed[path] = base64.b64decode(content) if content is not None else self.hub.blobs[str(oid)]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _modelscope_tree(self, revision: str) -> None:
        if revision != "master":
            self._json(404, {"Code": 10010205001, "Message": f"revision {revision} not found", "Success": False})
            return
        rows = [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.hub.files.items()
        ]
        self._json(200, {"Code": 200, "Success": True, "Data": {"Files": rows}})

    def _huggingface(self, path: str) -> None:
        about, content = f"/api/models/{self.hub.repository}", f"/{self.hub.repository}/resolve/{COMMIT}/"
        if path.startswith(content):
            self._file(path.removeprefix(content))
        elif path.startswith(f"{about}/tree/"):
            rows = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in self.hub.files.items()]
            self._json(200, rows)
        elif path in (about, f"{about}/revision/main"):
            self._json(200, self._about())
        elif path.startswith(about + "/"):
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _about(self) -> dict[str, Any]:
        return {"id": self.hub.repository, "sha": COMMIT, "siblings": [], "tags": [], "private": self.hub.private}

    def _file(self, name: str) -> None:
        data = self.hub.files[name]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"', "Content-Length": str(len(data) - first)}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._head(206 if first else 200, headers)
        if self.command == "HEAD":
            return
        self.hub.sent.append((name, first))
        end = self.hub.cut.pop(name, None)
        if end is not None:
            self.hub.down = self.hub.down_after_cut
            self.close_connection = True
        self.wfile.write(data[first:end])

    def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        length = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self._head(status, length | dict(headers or {}))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a free loopback port until the block ends, whatever happens in it."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
