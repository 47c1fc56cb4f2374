"""Another vendor's server: OpenAI's chat completions over plain HTTP, with answers made from the question."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "vendor-large"
KEY = "sk-of-the-vendor"


class VendorServer(ThreadingHTTPServer):
    """Keeps the bodies that it was asked with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: VendorServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers.get("authorization") != f"Bearer {KEY}":
            self._reply(401, "application/json", b'{"error": {"message": "no such key"}}')
            return
        if body["model"] != MODEL or self.path != "/v1/chat/completions":
            self._reply(404, "application/json", b'{"error": {"message": "no such model"}}')
            return
        self.server.bodies.append(body)
        self._reply(200, "text/event-stream", b"".join(_events(answer_to(body["messages"][-1]["content"]))))

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _reply(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def answer_to(question: str) -> str:
    """Say what this server answers."""
    return f"You asked: {question}"


def _events(text: str) -> Iterator[bytes]:
    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        chunk = {"id": "x", "object": "chat.completion.chunk", "model": MODEL, "choices": choices, "usage": usage}
        return f"data: {json.dumps(chunk)}\n\n".encode()

    words = text.split(" ")
    for i, word in enumerate(words):
        yield event([{"index": 0, "delta": {"content": word if i == 0 else f" {word}"}, "finish_reason": None}])
    yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield event([], {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)})
    yield b"data: [DONE]\n\n"


@contextmanager
def vendor_server() -> Iterator[VendorServer]:
    """Serve on a free loopback port for a block."""
    server = VendorServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
