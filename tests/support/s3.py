"""An S3-speaking server behind a TCP proxy that fails, stalls, cuts and resets connections."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any
from urllib.request import Request, urlopen

_BODY = b"<Error><Code>AccessDenied</Code></Error>"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Forwards bytes to `target`, and does harm to every `every`-th piece that clients send.

    `harms` are taken in turn: fail (503), reset (of the connection), cut (half of the piece is
    forwarded, then a reset), stall (nothing comes any more), lose (the request is forwarded and
    its answer is not). `every` 0 forwards all; `down` resets everything; `closed` refuses every
    request, as a bucket does to one without permission.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.every, self.down, self.closed = target, 0, False, False
        self.done: list[str] = []
        self._harms = cycle(["fail", "reset", "cut", "stall", "lose"])
        self._count, self._lock = 0, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No connection is accepted any more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _harm(self) -> str | None:
        with self._lock:
            if self.down:
                return "reset"
            self._count += 1
            if not self.every or self._count % self.every:
                return None
            harm = next(self._harms)
            self.done.append(harm)
            return harm

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self.target)
        muted = threading.Event()
        threading.Thread(target=self._answer, args=(server, client, muted), daemon=True).start()
        try:
            while piece := client.recv(1 << 16):
                if self.closed:
                    client.sendall(FORBIDDEN)
                    continue
                harm = self._harm()
                if harm == "fail":
                    client.sendall(UNAVAILABLE)
                    break
                if harm == "cut":
                    server.sendall(piece[: len(piece) // 2])
                if harm in ("reset", "cut"):
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                if harm in ("stall", "lose"):
                    muted.set()
                if harm != "stall":
                    server.sendall(piece)
                while harm == "stall" and client.recv(1 << 16):
                    pass
        except OSError:
            pass
        finally:
            for end in (client, server):
                end.close()

    def _answer(self, server: socket.socket, client: socket.socket, muted: Any) -> None:
        try:
            while piece := server.recv(1 << 16):
                if not muted.is_set():
                    client.sendall(piece)
        except OSError:
            pass


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """A server of its own with the empty bucket `models`; its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        # The servers of a process share what they hold.
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="models")
        yield host, port
    finally:
        server.stop()
