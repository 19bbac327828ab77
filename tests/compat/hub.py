"""A stand-in for the hub on this machine: repositories, LFS uploads and commits, as huggingface_hub uses them."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".png")


@dataclass
class Hub:
    """What arrived. `status` maps a part of a request's path to the error that it answers with."""

    token: str
    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """What makes huggingface_hub of another process come here."""
        # Xet has a protocol of its own; without it uploads go by LFS, as to servers that lack it.
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        for part, status in self.status.items():
            if part in path:
                return status, {"error": "refused"}
        for pattern, reply in _ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return reply(self, body, *found.groups())
        return 404, {"error": f"no such page: {method} {path}"}


def _create(hub: Hub, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    known = name in hub.repositories
    hub.repositories.setdefault(name, {})
    if asked.get("private") or asked.get("visibility") == "private":
        hub.private.add(name)
    return 409 if known else 200, {"url": f"{hub.url}/{name}"}


def _check_card(hub: Hub, body: bytes) -> tuple[int, Any]:
    return 200, {"warnings": [], "errors": []}


def _modes(hub: Hub, body: bytes, name: str) -> tuple[int, Any]:
    paths = [file["path"] for file in json.loads(body)["files"]]
    kinds = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
    return 200, {"files": [{"path": p, "uploadMode": kinds[p], "shouldIgnore": False, "oid": None} for p in paths]}


def _batch(hub: Hub, body: bytes, name: str) -> tuple[int, Any]:
    wanted = json.loads(body)["objects"]
    actions = [{**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in wanted]
    return 200, {"transfer": "basic", "objects": actions}


def _store(hub: Hub, body: bytes, oid: str) -> tuple[int, Any]:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    return 200, {}


def _commit(hub: Hub, body: bytes, name: str) -> tuple[int, Any]:
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
    return 200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1"}


_ROUTES = [
    ("POST /api/repos/create", _create),
    ("POST /api/validate-yaml", _check_card),
    ("POST /api/models/(.+)/preupload/main", _modes),
    ("POST /(.+)\\.git/info/lfs/objects/batch", _batch),
    ("PUT /lfs/(.+)", _store),
    ("POST /api/models/(.+)/commit/main", _commit),
]


@contextmanager
def running(token: str) -> Iterator[Hub]:
    """The stand-in, on a free port of this machine."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._reply("POST")

        def do_PUT(self) -> None:
            self._reply("PUT")

        def do_GET(self) -> None:
            self._reply("GET")

        def log_message(self, format: str, *args: Any) -> None:
            pass  # pytest shows what is asserted

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _reply(self, method: str) -> None:
            body = self._body()
            # Files go to signed addresses, all else needs the token.
            signed = self.path.startswith("/lfs/")
            if signed or self.headers.get("Authorization") == f"Bearer {hub.token}":
                status, answer = hub.answer(method, self.path.partition("?")[0], body)
            else:
                status, answer = 401, {"error": "Invalid credentials in Authorization header"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
