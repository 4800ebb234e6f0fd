"""A hub on loopback that serves one model directory, slowly if asked to, and counts requests."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from raytune_ft.model.load import resolve_model_path

MODEL = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`delay_s` passes before the weights are sent; `requests` are `METHOD path`."""

    url: str = ""
    delay_s: float = 0.0
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """For a process with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def downloads(self, file: str = "model.safetensors") -> int:
        """How often the file was sent."""
        return sum(each.startswith("GET") and each.endswith(f"/{file}") for each in self.requests)


@contextmanager
def hub_server(folder: Path | None = None) -> Iterator[Hub]:
    """Serves `folder`, by default the built-in model, as `org/tiny`."""
    folder = folder or Path(resolve_model_path("builtin:tiny"))
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if path.startswith(f"/api/models/{MODEL}/tree/"):
                files = [file for file in folder.iterdir() if file.is_file()]
                self._json([_entry(file) for file in files])
            elif path.startswith(f"/api/models/{MODEL}"):
                self._json({"id": MODEL, "sha": COMMIT, "siblings": []})
            elif path.startswith(f"/{MODEL}/resolve/"):
                self._file(folder / path.rpartition("/")[2])
            else:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

        def _file(self, file: Path) -> None:
            if not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if self.command == "GET" and file.suffix == ".safetensors":
                time.sleep(hub.delay_s)
            tag = {"ETag": f'"{_entry(file)["oid"]}"', "X-Repo-Commit": COMMIT}
            self._send(200, file.read_bytes(), tag)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # of a client that was killed
                    self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _entry(file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {
        "type": "file",
        "path": file.name,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
