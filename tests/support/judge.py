"""A judge over real HTTP."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret-of-this-test"


class Server(ThreadingHTTPServer):
    """Prefers the longer answer; one that says `first` wherever it stands first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.questions: list[str] = []
        self.statuses: list[int] = []  # of the next replies
        self.location = ""
        self.delay_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.send_error(401)
            return
        if self.path != "/v1/chat/completions" or body["model"] != "m":
            self.send_error(404)
            return
        if question != "Reply with 1.":
            status = self.server.statuses.pop(0) if self.server.statuses else 200
            if status != 200:
                self.send_response(status)
                self.send_header("Location", self.server.location)
                self.end_headers()
                return
            self.server.questions.append(question)
            time.sleep(self.server.delay_s)
        reply = {"choices": [{"message": {"content": _reply(question)}}]}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


def _reply(question: str) -> str:
    answers = re.findall(r"\[Answer.*?\]\n(.*?)\n\[End", question, re.S)
    if len(answers) == 2:
        if "first" in answers[0]:
            return "A"
        return "A" if len(answers[0]) > len(answers[1]) else "The better one is B."
    if answers and answers[0] == "mumble":
        return "hard to say"
    return f"I give it 0.{len(answers[0])}" if answers else "1"


@contextmanager
def serving() -> Iterator[Server]:
    """A judge that answers until the context ends."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()
