"""Stand-ins for the two hubs on a loopback port: enough of their interfaces for the real clients to fetch a directory.

What is answered follows the clients' own source (huggingface_hub 1.33, modelscope-hub 0.5): revision, tree and `resolve`
of the one; `repo/files` and `repo` of the other.
"""

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
        elif path.startswith("/api/v1/"):
            self._json(404, {"Code": 10010205001, "Message": "model not found", "Success": False})
        else:
            self._huggingface(path)

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
            self._json(200, {"id": self.hub.repository, "sha": COMMIT, "siblings": [], "tags": []})
        elif path.startswith(about + "/"):
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

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
