"""What a channel needs of a wire: bytes there and back, under deadlines, failing only with `CoveyError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class WireCall(Protocol):
    """One open call as its caller sees it."""

    async def send(self, data: bytes) -> None: ...

    async def done_sending(self) -> None: ...

    async def receive(self) -> bytes | None:
        """Return the next message, or None after the last; raise what the call failed with."""
        ...

    def cancel(self) -> None: ...


class Transport(Protocol):
    """A connection to one address. Headers include the credential."""

    @property
    def address(self) -> str: ...

    async def unary(self, path: str, data: bytes, *, timeout_s: float | None, headers: Mapping[str, str]) -> bytes: ...

    def stream(self, path: str, data: bytes, *, timeout_s: float | None, headers: Mapping[str, str]) -> WireCall: ...

    def exchange(self, path: str, *, timeout_s: float | None, headers: Mapping[str, str]) -> WireCall: ...

    async def aclose(self) -> None: ...


class ServerCall(Protocol):
    """One incoming call as the dispatcher sees it, whatever carries it."""

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def peer(self) -> str: ...

    def remaining_s(self) -> float: ...

    async def receive(self) -> bytes | None: ...

    async def send(self, data: bytes) -> None: ...


class Server(Protocol):
    """A listening server; `address` is `host:port` with the port that was bound."""

    @property
    def address(self) -> str: ...

    def set_serving(self, serving: bool) -> None:
        """Tell health checks and watchers whether to send work here."""
        ...
