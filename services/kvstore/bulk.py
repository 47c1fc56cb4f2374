"""The server of the bulk channel: blocks to and from the arena over plain TCP, beside the RPCs."""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

from covey.codec.messages import decode
from covey.errors import CoveyError, DataCorrupt, InvalidArgument, Overloaded, Unauthenticated, Unavailable
from covey.net.call import Token, encode_error
from covey.net.kv import bulk_frame
from covey.net.kv.bulk_frame import COUNT, DATA_BYTES_MAX, NONCE_BYTES, Frame, Kind
from covey.net.tasks import background_tasks
from covey.policy.store_index import Placed
from covey.types.kv import GetRequest, WriteChunk

from .bulk_peer import Peer
from .transfers import SlotReader, Transfers

GATHERED_BYTES = 1024 * 1024
"""Sent in one go when blocks are small."""
HANDSHAKE_S = 5.0

Condemn = Callable[[Placed, str], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkLimits:
    """Bounds of a bulk server."""

    connections_max: int = 64
    stall_s: float = 30.0
    """How long a peer may take in the middle of an exchange without taking or sending a byte."""
    idle_s: float = 300.0
    """How long a connection may wait for its next exchange."""


class BulkServer:
    """Serves connections, each a task; more than `connections_max` are refused as `Overloaded`."""

    def __init__(self, transfers: Transfers, condemn: Condemn, *, token: Token | None, limits: BulkLimits) -> None:
        self._transfers = transfers
        self._condemn = condemn
        self._token = token
        self._limits = limits
        self._connections = 0

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return self._connections

    @asynccontextmanager
    async def serve(self, listen: str) -> AsyncIterator[str]:
        """Listen for a block; yields the address. Raises `Unavailable` when it cannot be bound."""
        host, _, port = listen.rpartition(":")
        host = host or "127.0.0.1"
        try:
            listener = socket.create_server((host, int(port)), backlog=self._limits.connections_max)
        except OSError as error:
            raise Unavailable(f"cannot listen on {listen}: is the port taken?", field="bulk_listen") from error
        listener.setblocking(False)
        with listener:
            async with background_tasks() as tg:
                tg.start_soon(self._accept, listener, tg, name="bulk channel")
                yield f"{host}:{listener.getsockname()[1]}"

    async def _accept(self, listener: socket.socket, tg: TaskGroup) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
                continue
            except OSError:  # out of descriptors, or the peer is gone already
                await anyio.sleep(0.1)
                continue
            self._connections += 1
            tg.start_soon(self._serve, Peer(connection, self._limits.stall_s), name="bulk connection")

    async def _serve(self, peer: Peer) -> None:
        """Serve a connection to its end; what does not fit ends it, and the peer is told why."""
        try:
            if self._connections > self._limits.connections_max:
                raise Overloaded("too many bulk connections", retry_after_ms=1000)
            await self._shake_hands(peer)
            while (frame := await peer.header(self._limits.idle_s)) is not None:
                await self._exchange(peer, frame)
        except (CoveyError, OSError) as error:
            await self._refuse(peer, error)
        finally:
            self._connections -= 1
            peer.close()

    async def _refuse(self, peer: Peer, error: CoveyError | OSError) -> None:
        if isinstance(error, OSError) or not peer.is_between_frames:
            return
        try:
            await _tell(peer, error)
        except (CoveyError, OSError):
            return
        await peer.hang_up()

    async def _shake_hands(self, peer: Peer) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        with anyio.move_on_after(HANDSHAKE_S):
            await peer.send((bulk_frame.pack(Kind.CHALLENGE, NONCE_BYTES), nonce))
            frame = _expected(await peer.header(), Kind.PROOF)
            answer = await peer.take(frame.length)
            theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
            known = [
                key
                for key in bulk_frame.keys_of(self._token)
                if hmac.compare_digest(proof, bulk_frame.client_proof(key, nonce, theirs))
            ]
            if not known:
                raise Unauthenticated("this channel needs the mesh token")
            mine = bulk_frame.server_proof(known[0], nonce, theirs)
            await peer.send((bulk_frame.pack(Kind.WELCOME, len(mine)), mine))
            return
        raise Unauthenticated("no proof of the mesh token came")

    async def _exchange(self, peer: Peer, frame: Frame) -> None:
        if frame.kind is Kind.WRITE:
            await self._write(peer, frame)
            return
        request: GetRequest = decode(GetRequest, await peer.take(_expected(frame, Kind.READ).length))
        try:
            reader = self._transfers.read(request)
            try:
                await self._read(peer, reader)
            except DataCorrupt as error:
                if reader.slot is not None:
                    await self._condemn(reader.slot, error.message)
                raise
        except CoveyError as error:
            if not peer.is_between_frames or isinstance(error, Unavailable):
                raise
            await _tell(peer, error)  # the request was read whole: the connection is as good as before

    async def _read(self, peer: Peer, reader: SlotReader) -> None:
        """Send pieces straight from the arena, at least `GATHERED_BYTES` a time."""
        gathered: list[bytes | memoryview] = []
        waiting = total = 0
        try:
            for piece in reader.pieces(DATA_BYTES_MAX):
                if piece.checksums:
                    sums = struct.pack(f"<{len(piece.checksums)}Q", *piece.checksums)
                    gathered += (bulk_frame.pack(Kind.SUMS, len(sums)), sums)
                gathered += (bulk_frame.pack(Kind.DATA, piece.data.nbytes), piece.data)
                waiting += piece.data.nbytes
                if waiting >= GATHERED_BYTES:
                    await peer.send(gathered, reader.check)
                    gathered, total, waiting = [], total + waiting, 0
        except DataCorrupt:
            await peer.send(gathered, reader.check)  # what comes before a bad block is good
            raise
        gathered += (bulk_frame.pack(Kind.DONE, COUNT.size), COUNT.pack(total + waiting))
        await peer.send(gathered, reader.check)

    async def _write(self, peer: Peer, frame: Frame) -> None:
        """Receive blocks straight into their slots."""
        total = 0
        while frame.kind is Kind.WRITE:
            chunk: WriteChunk = decode(WriteChunk, await peer.take(frame.length))
            size = self._transfers.slot(chunk).nbytes
            filled = 0
            while filled < size:
                piece = _expected(await peer.header(self._limits.stall_s), Kind.DATA)
                if piece.length > size - filled:
                    raise InvalidArgument(f"a block has {size} bytes", field="data")
                start = filled

                def room(chunk: WriteChunk = chunk, start: int = start) -> memoryview:
                    return self._transfers.slot(chunk)[start:]

                await peer.fill(piece.length, room)
                filled += piece.length
            total += size
            frame = _expected(await peer.header(self._limits.stall_s), Kind.WRITE, Kind.DONE)
        await peer.take(frame.length)
        await peer.send((bulk_frame.pack(Kind.DONE, COUNT.size), COUNT.pack(total)))


def _expected(frame: Frame | None, *kinds: Kind) -> Frame:
    if frame is None:
        raise Unavailable("the peer ended the connection in the middle of an exchange")
    if frame.kind not in kinds:
        raise InvalidArgument(
            f"{frame.kind.name} came where {' or '.join(kind.name for kind in kinds)} is due", field="kind"
        )
    return frame


async def _tell(peer: Peer, error: CoveyError) -> None:
    data = encode_error(error)
    await peer.send((bulk_frame.pack(Kind.ERROR, len(data)), data))
