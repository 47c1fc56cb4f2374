"""A client's end of the bulk channel: blocking sockets, used by one thread at a time, and the few that are kept."""

from __future__ import annotations

import hmac
import math
import secrets
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from anyio import CapacityLimiter, to_thread

from covey.clock import Clock
from covey.codec.messages import encode
from covey.errors import CoveyError, Unauthenticated, Unavailable
from covey.net.call import Token, decode_error
from covey.net.kv import bulk_frame
from covey.net.kv.bulk_frame import HEADER, NONCE_BYTES, Frame, Kind

CONNECT_TIMEOUT_S: Final = 1.0
RETRY_S: Final = 10.0
"""How long a server that cannot be reached over its bulk channel is reached over gRPC instead."""


class BulkConnection:
    """One authenticated connection. Every call fails only with `CoveyError`; then the connection is of no more use."""

    def __init__(self, address: str, token: Token | None, *, stall_s: float) -> None:
        """Connect; `stall_s` bounds each wait for the other side. Raises `Unavailable` and `Unauthenticated`."""
        host, _, port = address.rpartition(":")
        self.in_use = threading.Lock()
        """Held by the thread that works with the connection: it is not closed under it."""
        self._header = bytearray(HEADER.size)
        try:
            self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise Unavailable(f"the bulk channel at {address} does not answer") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(stall_s)
            self._shake_hands(token)
        except BaseException:
            self.close()
            raise

    def request(self, kind: Kind, value: object) -> None:
        """Send a frame with a message of `covey.types`."""
        data = encode(value)
        self.send((bulk_frame.pack(kind, len(data)), data))

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send buffers as they lie, without a copy."""
        left = deque(memoryview(buffer) for buffer in buffers)
        try:
            while left:
                sent = self._socket.sendmsg(left)
                while left and sent >= left[0].nbytes:
                    sent -= left.popleft().nbytes
                if sent:
                    left[0] = left[0][sent:]
        except OSError as error:
            raise self._refused() or Unavailable("the bulk channel broke off") from error

    def receive(self, *expected: Kind) -> Frame:
        """Return the next header. Raises what the server answers instead, or `Unavailable`."""
        self.receive_into(memoryview(self._header))
        try:
            frame = bulk_frame.unpack(self._header)
        except CoveyError as error:
            raise Unavailable(f"the bulk channel sent nonsense: {error.message}") from error
        if frame.kind is Kind.ERROR:
            raise decode_error(self.take(frame.length))
        if frame.kind not in expected:
            raise Unavailable(f"the bulk channel sent {frame.kind.name} out of turn")
        return frame

    def receive_into(self, view: memoryview) -> None:
        """Fill a buffer. Raises `Unavailable` when the other side stalls or is gone."""
        try:
            while view.nbytes:
                count = self._socket.recv_into(view)
                if not count:
                    raise Unavailable("the bulk channel was closed")
                view = view[count:]
        except OSError as error:
            raise Unavailable("the bulk channel broke off") from error

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        data = bytearray(count)
        self.receive_into(memoryview(data))
        return bytes(data)

    @property
    def is_idle(self) -> bool:
        """Whether nothing has come since the last exchange, not even the end of the connection."""
        return not select.select([self._socket], [], [], 0)[0]

    def abort(self) -> None:
        """Wake the thread that waits for the other side; may be called from any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and with it what a thread does with it."""
        self.abort()
        with self.in_use:
            self._socket.close()

    def _shake_hands(self, token: Token | None) -> None:
        server_nonce = self.take(self.receive(Kind.CHALLENGE).length)
        nonce = secrets.token_bytes(NONCE_BYTES)
        keys = bulk_frame.keys_of(token)
        proof = bulk_frame.client_proof(keys[0], server_nonce, nonce)
        self.send((bulk_frame.pack(Kind.PROOF, len(nonce) + len(proof)), nonce, proof))
        answer = self.take(self.receive(Kind.WELCOME).length)
        if not any(hmac.compare_digest(answer, bulk_frame.server_proof(key, server_nonce, nonce)) for key in keys):
            raise Unauthenticated("the bulk channel's server does not know the mesh token")

    def _refused(self) -> CoveyError | None:
        """What the server said before it closed the connection, if it did."""
        try:
            self.receive()
        except CoveyError as error:
            return error
        return None


class BulkPool:
    """Connections to one server that wait for their next use. All but `open` belongs to one event loop."""

    def __init__(self, address: str, token: Token | None, *, stall_s: float, kept_max: int, clock: Clock) -> None:
        self.address = address
        self._token = token
        self._stall_s = stall_s
        self._kept_max = kept_max
        self._clock = clock
        self._kept: list[BulkConnection] = []
        self._works = False
        self._try_at = -math.inf

    async def works(self, limiter: CapacityLimiter) -> bool:
        """Whether the server can be reached from here; a failure is believed for `RETRY_S`."""
        if self._works or self._clock.now() < self._try_at:
            return self._works
        try:
            self.give(await to_thread.run_sync(self.open, limiter=limiter))
        except CoveyError:
            self._try_at = self._clock.now() + RETRY_S
        return self._works

    def take(self) -> BulkConnection | None:
        """Return a connection that nobody uses, if there is a live one."""
        while self._kept:
            connection = self._kept.pop()
            if connection.is_idle:
                return connection
            connection.close()
        return None

    def open(self) -> BulkConnection:
        """Connect anew, in a worker's thread. Raises `Unavailable`, `Overloaded` and `Unauthenticated`."""
        return BulkConnection(self.address, self._token, stall_s=self._stall_s)

    def give(self, connection: BulkConnection) -> None:
        """Keep a connection whose exchange is over."""
        self._works = True
        if len(self._kept) < self._kept_max:
            self._kept.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close what is kept."""
        while self._kept:
            self._kept.pop().close()

    def __del__(self) -> None:
        self.close()
