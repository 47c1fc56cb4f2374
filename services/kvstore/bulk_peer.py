"""One connection of the bulk channel as the server sees it: every wait for the other side has a bound."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio

from covey.errors import Unavailable
from covey.net.kv import bulk_frame
from covey.net.kv.bulk_frame import HEADER, Frame

STEP_BYTES: Final = 1024 * 1024
"""Moved before the event loop gets its turn."""
BUFFERS_MAX: Final = 64
"""Buffers in one call; the kernel takes up to 1,024."""
DRAINED_BYTES_MAX: Final = 64 * 1024 * 1024
"""Read and thrown away from a peer that was refused while it sent, so that it sees the refusal."""
LINGER_S: Final = 1.0


class Peer:
    """A socket that does not block; the server's task for it is its only user."""

    def __init__(self, connection: socket.socket, stall_s: float) -> None:
        """`stall_s` bounds each wait in the middle of an exchange."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_between_frames = True
        """Whether what was sent so far ends with a whole frame: an error can be told."""
        self._socket = connection
        self._stall_s = stall_s

    async def header(self, timeout_s: float | None = None) -> Frame | None:
        """Return the next header; None when the peer ended the connection before one. Raises what `unpack` does."""
        data = bytearray(HEADER.size)
        if not await self._receive(memoryview(data), timeout_s, may_end=True):
            return None
        return bulk_frame.unpack(data)

    async def take(self, count: int) -> bytes:
        """Return the next bytes."""
        data = bytearray(count)
        await self._receive(memoryview(data), None)
        return bytes(data)

    async def fill(self, count: int, room: Callable[[], memoryview]) -> None:
        """Receive into what `room` returns; it is asked again after every pause, and raises what ends this."""
        filled = 0
        while filled < count:
            view = room()[filled : min(count, filled + STEP_BYTES)]
            try:
                got = self._socket.recv_into(view)
            except BlockingIOError:
                await self._wait(anyio.wait_readable, None)
                continue
            if not got:
                raise Unavailable("the peer ended the connection in the middle of a frame")
            filled += got
            await anyio.lowlevel.checkpoint()

    async def send(self, buffers: Sequence[bytes | memoryview], check: Callable[[], None] | None = None) -> None:
        """Send whole frames as they lie; `check` is asked again after every pause, and raises what ends this."""
        left = deque(memoryview(buffer) for buffer in buffers)
        while left:
            if check is not None:
                check()
            try:
                sent = self._socket.sendmsg([left[i] for i in range(min(len(left), BUFFERS_MAX))])
            except BlockingIOError:
                await self._wait(anyio.wait_writable, None)
                continue
            self.is_between_frames = False
            while left and sent >= left[0].nbytes:
                sent -= left.popleft().nbytes
            if sent:
                left[0] = left[0][sent:]
            await anyio.lowlevel.checkpoint()
        self.is_between_frames = True

    async def hang_up(self) -> None:
        """End our side, and read for a moment what the peer still sends: else it might never see what we said."""
        with suppress(OSError, Unavailable), anyio.move_on_after(LINGER_S):
            self._socket.shutdown(socket.SHUT_WR)
            scrap, drained = memoryview(bytearray(STEP_BYTES // 16)), 0
            while drained < DRAINED_BYTES_MAX:
                try:
                    got = self._socket.recv_into(scrap)
                except BlockingIOError:
                    await self._wait(anyio.wait_readable, LINGER_S)
                    continue
                if not got:
                    return
                drained += got
                await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    async def _receive(self, view: memoryview, timeout_s: float | None, *, may_end: bool = False) -> bool:
        """Fill a buffer; return False for an end before its first byte, where there may be one."""
        size = view.nbytes
        while view.nbytes:
            try:
                got = self._socket.recv_into(view)
            except BlockingIOError:
                await self._wait(anyio.wait_readable, timeout_s if view.nbytes == size else None)
                continue
            if not got:
                if may_end and view.nbytes == size:
                    return False
                raise Unavailable("the peer ended the connection in the middle of a frame")
            view = view[got:]
        return True

    async def _wait(self, until: Callable[[socket.socket], object], timeout_s: float | None) -> None:
        try:
            with anyio.fail_after(self._stall_s if timeout_s is None else timeout_s):
                await until(self._socket)  # type: ignore[misc] # one of anyio's two
        except TimeoutError as error:
            raise Unavailable("the peer made no progress") from error
