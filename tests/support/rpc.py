"""Small things that tests of RPC share."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from covey.types.flow import ToolBeat, ToolCancel, ToolHello, ToolServerMessage, ToolWorkerMessage


@dataclass(frozen=True, slots=True)
class PlainToken:
    """A mesh token from a string."""

    value: str

    def matches(self, presented: str) -> bool:
        return hmac.compare_digest(self.value.encode(), presented.encode())

    def bearer(self) -> str:
        return f"Bearer {self.value}"


def ping(number: int) -> ToolWorkerMessage:
    return ToolHello(worker=f"w{number}", tools=())


def pong(message: ToolWorkerMessage) -> ToolServerMessage:
    assert isinstance(message, ToolHello | ToolBeat)
    return ToolCancel(key=message.worker if isinstance(message, ToolHello) else "beat")
