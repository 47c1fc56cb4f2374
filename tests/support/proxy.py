"""A TCP proxy on loopback that does to connections what networks do: cut, flip, delay, swallow, slow down."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from anyio.abc import SocketStream

CHUNK_BYTES = 64 * 1024


@dataclass(slots=True)
class Fault:
    """What happens to the bytes that the server sends; all of it may be changed while connections are open.

    `cut_after`: the connection ends once so many bytes went through. `flip_at`: every bit of the byte at that place is
    turned. `delay_s`: each chunk waits. `blackhole`: bytes are swallowed, the connection stays. `bytes_per_s`: no
    faster than that. Places count per connection, or from the first connection on with `in_all`.
    """

    cut_after: int | None = None
    flip_at: int | None = None
    delay_s: float = 0.0
    blackhole: bool = False
    bytes_per_s: float | None = None
    in_all: bool = True


@dataclass(slots=True)
class Proxy:
    """A listening proxy. `fault` is public."""

    address: str
    target: str
    fault: Fault = field(default_factory=Fault)
    connections: int = 0
    passed: int = 0
    """Bytes that came from the server, over all connections."""
    struck: int = 0
    """How often a cut or a flip happened."""

    async def serve(self, client: SocketStream) -> None:
        """Carry one connection."""
        self.connections += 1
        host, _, port = self.target.rpartition(":")
        async with client:
            try:
                server = await anyio.connect_tcp(host, int(port))
            except OSError:
                return
            async with server, anyio.create_task_group() as tg:
                tg.start_soon(self._up, client, server, tg.cancel_scope)
                tg.start_soon(self._down, server, client, tg.cancel_scope)

    async def _up(self, client: SocketStream, server: SocketStream, scope: anyio.CancelScope) -> None:
        try:
            while True:
                data = await client.receive(CHUNK_BYTES)
                if not self.fault.blackhole:
                    await server.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            scope.cancel()

    async def _down(self, server: SocketStream, client: SocketStream, scope: anyio.CancelScope) -> None:
        own = 0
        try:
            while True:
                data = await server.receive(CHUNK_BYTES)
                fault, before = self.fault, self.passed if self.fault.in_all else own
                own += len(data)
                self.passed += len(data)
                await anyio.sleep(fault.delay_s + (len(data) / fault.bytes_per_s if fault.bytes_per_s else 0.0))
                if fault.flip_at is not None and before <= fault.flip_at < before + len(data):
                    at = fault.flip_at - before
                    data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                    self.struck += 1
                if fault.cut_after is not None and before + len(data) > fault.cut_after:
                    self.struck += 1
                    await client.send(data[: max(0, fault.cut_after - before)])
                    break
                if not self.fault.blackhole:
                    await client.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def proxy_to(target: str) -> AsyncIterator[Proxy]:
    """A proxy in front of `host:port` for a block."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0) as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        proxy = Proxy(address=f"127.0.0.1:{port}", target=target)
        async with anyio.create_task_group() as tg:
            tg.start_soon(listener.serve, proxy.serve)
            yield proxy
            tg.cancel_scope.cancel()
