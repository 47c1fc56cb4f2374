"""A chat server with exact timing under virtual time: a system to measure whose figures are known."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from benchmarks.load import Sample
from benchmarks.system import Serving
from covey.errors import Unavailable

READY_S = 3.0


@dataclass
class SlowServer:
    """Answers any number of requests at once: the first token after `first_s`, the others every `gap_s`."""

    name: str = "covey"
    first_s: float = 0.5
    gap_s: float = 0.1
    tokens: int = 5
    extra: Mapping[str, Any] = field(default_factory=lambda: {"cache": "bypass"})
    outcome: str | None = "bypass"
    fails_from_start: int | None = None
    status: int = 200
    starts: int = 0
    running: int = 0
    asked: list[str] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Serving]:
        self.starts += 1
        if self.fails_from_start is not None and self.starts >= self.fails_from_start:
            raise Unavailable("no such luck")
        await anyio.sleep(READY_S)
        self.running += 1
        try:
            yield Serving(client=self.client(), ready_s=READY_S, pids={"server": os.getpid()})
        finally:
            self.running -= 1

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer), base_url="http://slow")

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["stream"] is True
        assert body.get("cache") == self.extra.get("cache")
        self.asked.append(body["messages"][0]["content"])
        self.sent.append(anyio.current_time())
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": "not now"}})
        return httpx.Response(200, content=self._chunks())

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield _line({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(self.tokens):
            await anyio.sleep(self.gap_s if i else self.first_s)
            yield _line({"choices": [{"delta": {"content": "a"}}]})
        last: dict[str, Any] = {"choices": [], "usage": {"completion_tokens": self.tokens}}
        if self.outcome is not None:
            last["covey"] = {"cache": self.outcome}
        yield _line(last)
        yield b"data: [DONE]\n\n"


def _line(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def sample(*, started: float, first_s: float, gap_s: float, tokens: int, error: str = "") -> Sample:
    """A finished request of known times."""
    at = [started + first_s + i * gap_s for i in range(tokens)] if not error else []
    ended = at[-1] if at else started
    return Sample(started=started, tokens_at=at, ended=ended, output_tokens=len(at), error=error)
