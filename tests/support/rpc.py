"""Small things that tests of RPC share."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from covey.net.rpc import Call, Channel, Server
from covey.types.common import Empty
from covey.types.flow import ToolBeat, ToolCancel, ToolHello, ToolServerMessage, ToolWorkerMessage
from covey.types.generate import EngineLoad, Event, GenerateRequest, Progress, Sampling, Stage
from covey.types.ids import RequestId, TenantId


@dataclass(frozen=True, slots=True)
class Wire:
    """How to serve and how to open a channel, on one kind of wire."""

    serve: Callable[..., AbstractAsyncContextManager[Server]]
    open: Callable[..., AbstractAsyncContextManager[Channel]]


@dataclass(frozen=True, slots=True)
class PlainToken:
    """A mesh token from a string."""

    value: str

    def matches(self, presented: str) -> bool:
        return hmac.compare_digest(self.value.encode(), presented.encode())

    def keys(self) -> tuple[bytes, ...]:
        return (self.bearer().encode(),)

    def bearer(self) -> str:
        return f"Bearer {self.value}"


def ping(number: int) -> ToolWorkerMessage:
    return ToolHello(worker=f"w{number}", tools=())


def pong(message: ToolWorkerMessage) -> ToolServerMessage:
    assert isinstance(message, ToolHello | ToolBeat)
    return ToolCancel(key=message.worker if isinstance(message, ToolHello) else "beat")


def generate_request(**changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {
        "request_id": RequestId("r1"),
        "tenant": TenantId("local"),
        "model": "m",
        "scopes": (),
        "token_ids": (1, 2, 3),
        "sampling": Sampling(max_tokens=4),
        "deadline_s": 5.0,
    }
    return GenerateRequest(**(values | changes))


async def load(request: Empty, call: Call) -> EngineLoad:
    return EngineLoad(running=7)


async def count(request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
    for i in range(request.sampling.max_tokens):
        yield Progress(stage=Stage.DECODE, done=i)
