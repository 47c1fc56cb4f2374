"""In-process servers by address, called through the same `Channel` as real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from random import Random

import anyio
from anyio.abc import TaskGroup

from covey.errors import CoveyError, Unavailable
from covey.net.call import MESSAGE_BYTES_MAX, Gatekeeper, Handlers, Token
from covey.net.channels import Channel, Channels
from covey.net.dispatcher import Dispatcher
from covey.net.memory_wire import Faults, MemoryCall


class MemoryServer:
    """One served address. `serving` is what health would say."""

    def __init__(self, address: str, dispatcher: Dispatcher, tg: TaskGroup, message_bytes_max: int) -> None:
        self.address = address
        self.serving = True
        self.message_bytes_max = message_bytes_max
        self._dispatcher = dispatcher
        self._tg = tg
        self._calls: set[MemoryCall] = set()

    def set_serving(self, serving: bool) -> None:
        self.serving = serving

    def accept(self, call: MemoryCall) -> None:
        self._calls.add(call)
        self._tg.start_soon(self._run, call, name=f"rpc {call.path}")

    def cut(self) -> None:
        """End all calls in flight at once, as a killed process does."""
        for call in tuple(self._calls):
            call.end(Unavailable(f"{self.address} is gone"))
            call.scope.cancel()

    async def drain(self, grace_s: float) -> None:
        with anyio.move_on_after(grace_s):
            await self._dispatcher.until_idle()
        for call in self._calls:
            call.scope.cancel()

    async def _run(self, call: MemoryCall) -> None:
        error: CoveyError | None = None
        try:
            with call.scope:
                try:
                    await self._dispatcher.run(call.path, call.server)
                except CoveyError as raised:
                    error = raised
                call.end(error)
        finally:
            call.end_overdue()
            self._calls.discard(call)


class MemoryNetwork:
    """All servers of one test. Faults strike each message of a call; `disconnect` cuts an address off."""

    def __init__(self, *, seed: int = 0, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self._rng = Random(seed)  # noqa: S311 - repeatable faults, not a secret
        self._ports = count(1)
        self._servers: dict[str, MemoryServer] = {}
        self._cut_off: set[str] = set()

    @asynccontextmanager
    async def serve(
        self, address: str, handlers: Handlers, *, token: Token | Gatekeeper | None = None, grace_s: float = 10.0,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> AsyncIterator[MemoryServer]:  # fmt: skip
        """Serve handlers for a block, as `covey.net.rpc.serve` does."""
        host, _, port = address.rpartition(":")
        address = f"{host or '127.0.0.1'}:{next(self._ports) if port == '0' else port}"
        if address in self._servers:
            raise Unavailable(f"cannot listen on {address}: is the port taken?", field="listen")
        dispatcher = Dispatcher(handlers, token=token, message_bytes_max=message_bytes_max)
        async with anyio.create_task_group() as tg:
            server = self._servers[address] = MemoryServer(address, dispatcher, tg, message_bytes_max)
            try:
                yield server
            finally:
                server.set_serving(False)
                del self._servers[address]
                with anyio.CancelScope(shield=True):
                    await server.drain(grace_s)

    @asynccontextmanager
    async def channel(self, address: str, *, token: Token | None = None) -> AsyncIterator[Channel]:
        """Own a channel for a block, as `Channel.open` does."""
        channel = Channel(self.transport(address), token=token)
        try:
            yield channel
        finally:
            await channel.aclose()

    def channels(self, *, token: Token | None = None) -> AbstractAsyncContextManager[Channels]:
        """Own channels for a block, as `Channels.open` does."""
        return Channels.open(token=token, transport=self.transport)

    def transport(self, address: str) -> MemoryTransport:
        return MemoryTransport(self, address)

    def disconnect(self, address: str) -> None:
        """Cut an address off: its calls end, new ones are `Unavailable`, until `reconnect`."""
        self._cut_off.add(address)
        if address in self._servers:
            self._servers[address].cut()

    def reconnect(self, address: str) -> None:
        self._cut_off.discard(address)

    def connect(self, address: str, path: str, *, timeout_s: float | None, headers: Mapping[str, str]) -> MemoryCall:
        """Start a call; it has ended as `Unavailable` when nothing is served at the address or it is cut off."""
        server = self._servers.get(address)
        call = MemoryCall(
            path,
            timeout_s=timeout_s,
            headers=headers,
            message_bytes_max=server.message_bytes_max if server else MESSAGE_BYTES_MAX,
            faults=self.faults,
            rng=self._rng,
            now=anyio.current_time,
        )
        if server is None or address in self._cut_off:
            call.end(Unavailable(f"{path.removeprefix('/')} at {address}: unavailable"))
        else:
            server.accept(call)
        return call


class MemoryTransport:
    """A `Transport` to one address of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self.address = address
        self._network = network

    async def unary(self, path: str, data: bytes, *, timeout_s: float | None, headers: Mapping[str, str]) -> bytes:
        call = self.exchange(path, timeout_s=timeout_s, headers=headers)
        try:
            await call.send(data)
            await call.done_sending()
            reply = await call.receive()
            await call.receive()
            return reply or b""
        finally:
            call.cancel()

    def stream(self, path: str, data: bytes, *, timeout_s: float | None, headers: Mapping[str, str]) -> MemoryCall:
        call = self.exchange(path, timeout_s=timeout_s, headers=headers)
        call.send_only(data)
        return call

    def exchange(self, path: str, *, timeout_s: float | None, headers: Mapping[str, str]) -> MemoryCall:
        return self._network.connect(self.address, path, timeout_s=timeout_s, headers=headers)

    async def aclose(self) -> None:
        """Nothing is held."""
