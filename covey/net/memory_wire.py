"""One in-process call: two bounded queues between a caller and a handler, cut off by deadline, cancel or fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from covey.errors import CoveyError, DeadlineExceeded, PayloadTooLarge, Unavailable

WINDOW = 64
"""Messages a sender may be ahead of its reader, as flow control bounds it on a real wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Chances per message, drawn from a seed. On RPC a dropped or cut message ends its call as `Unavailable`."""

    drop: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.05
    disconnect: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= chance <= 1 for chance in (self.drop, self.delay, self.disconnect)) or self.delay_s < 0:
            raise ValueError("drop, delay and disconnect are chances from 0 to 1, delay_s is not negative")

    async def strike(self, rng: Random, what: str) -> bool:
        """Delay, cut (raises `Unavailable`) or lose a message; return whether it arrives."""
        if rng.random() < self.delay:
            await anyio.sleep(rng.uniform(0, self.delay_s))
        if rng.random() < self.disconnect:
            raise Unavailable(f"{what}: the connection was cut")
        return rng.random() >= self.drop


class MemoryCall:
    """Both ends of one call: a `WireCall` for the caller; `server` is the handler's end."""

    def __init__(
        self, path: str, *, timeout_s: float | None, headers: Mapping[str, str], message_bytes_max: int,
        faults: Faults, rng: Random, now: Callable[[], float],
    ) -> None:  # fmt: skip
        self.path = path
        self.headers = dict(headers)
        self.deadline = math.inf if timeout_s is None else now() + timeout_s
        self.scope = anyio.CancelScope(deadline=self.deadline)
        """The handler runs in it: the caller's cancel and the deadline end it."""
        self.server = _ServerEnd(self, now)
        self.faults = faults
        self._rng = rng
        self._message_bytes_max = message_bytes_max
        self._requests = anyio.create_memory_object_stream[bytes](WINDOW)
        self._replies = anyio.create_memory_object_stream[bytes](WINDOW)
        self._ended = anyio.Event()
        self._error: CoveyError | None = None

    async def send(self, data: bytes) -> None:
        await self._put(self._requests[0], data)

    def send_only(self, data: bytes) -> None:
        """Send the one request of a server stream."""
        if not self._ended.is_set():
            self._requests[0].send_nowait(data)
            self._requests[0].close()

    async def done_sending(self) -> None:
        self._requests[0].close()

    async def receive(self) -> bytes | None:
        with anyio.CancelScope(deadline=self.deadline) as scope:
            try:
                return await self._replies[1].receive()
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                await self._ended.wait()
                if self._error is not None:
                    raise self._error from None
                return None
        assert scope.cancelled_caught
        raise self._overdue()

    def cancel(self) -> None:
        self.scope.cancel()
        for stream in (*self._requests, *self._replies):
            stream.close()

    def end(self, error: CoveyError | None) -> None:
        """Let the caller see the end of the call: after the replies sent so far, or this error."""
        if not self._ended.is_set():
            self._error = error
            self._ended.set()
            self._replies[0].close()
            self._requests[1].close()

    def end_overdue(self) -> None:
        """End a call whose handler was cancelled: by its deadline or by the server's stop."""
        overdue = self.scope.deadline != math.inf and anyio.current_time() >= self.deadline
        self.end(self._overdue() if overdue else Unavailable(f"{self.path}: the server stopped"))

    async def put_reply(self, data: bytes) -> None:
        await self._put(self._replies[0], data)

    async def take_request(self) -> bytes | None:
        try:
            return await self._requests[1].receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return None

    async def _put(self, stream: MemoryObjectSendStream[bytes], data: bytes) -> None:
        if len(data) > self._message_bytes_max:
            raise PayloadTooLarge(f"{self.path}: a message is over the limit of its receiver")
        with anyio.CancelScope(deadline=self.deadline) as scope:
            # HTTP/2 never loses one message of a stream: a loss is the loss of the connection.
            if not await self.faults.strike(self._rng, self.path):
                raise Unavailable(f"{self.path}: the connection was lost")
            try:
                await stream.send(data)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                raise self._error or Unavailable(f"{self.path}: the other side is gone") from None
        if scope.cancelled_caught:
            raise self._overdue()

    def _overdue(self) -> CoveyError:
        return DeadlineExceeded(f"{self.path.removeprefix('/')}: deadline exceeded")


class _ServerEnd:
    """A `ServerCall` over a `MemoryCall`."""

    peer = "memory"

    def __init__(self, call: MemoryCall, now: Callable[[], float]) -> None:
        self._call = call
        self._now = now

    @property
    def headers(self) -> Mapping[str, str]:
        return self._call.headers

    def remaining_s(self) -> float:
        return self._call.deadline - self._now()

    async def receive(self) -> bytes | None:
        return await self._call.take_request()

    async def send(self, data: bytes) -> None:
        await self._call.put_reply(data)
