"""The bulk channel from outside: who may speak, what is refused, and that nothing that is sent ends the node."""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.auth import MeshToken
from covey.codec.messages import encode
from covey.codec.methods import KvStore
from covey.errors import (
    CoveyError,
    Fenced,
    InvalidArgument,
    LeaseExpired,
    Overloaded,
    PayloadTooLarge,
    Unauthenticated,
    Unavailable,
)
from covey.net.call import Token, decode_error
from covey.net.kv import bulk_frame
from covey.net.kv.bulk_connection import BulkConnection
from covey.net.kv.bulk_frame import HEADER, NONCE_BYTES, Kind
from covey.net.rpc import Channels
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import BlockKey, GetRequest, GrantStatus, ReserveReply, ReserveRequest, WriteChunk
from covey.types.store import StoreKey
from tests.contract.kv_stores import StoreProcess, client_of, store_process

SHAPE = BlockShape(size_bytes=1 << 20, layers=4)
STALL_S = 0.5
REFUSALS = (InvalidArgument, PayloadTooLarge, LeaseExpired, Fenced, Unauthenticated, Unavailable, Overloaded)


@pytest.fixture(scope="module")
def bulk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    sets = (f"bulk_stall_s={STALL_S}", "bulk_connections_max=4", "capacity_bytes=33554432")
    with store_process(tmp_path_factory.mktemp("bulk"), *sets) as process:
        yield process


async def address_of(process: StoreProcess) -> str:
    async with Channels.open() as channels:
        return (await channels.to(process.address).call(KvStore.INFO, Empty(), timeout_s=5)).bulk_address


async def connected(process: StoreProcess, token: Token | None = None) -> BulkConnection:
    address = await address_of(process)
    return await to_thread.run_sync(lambda: BulkConnection(address, token, stall_s=5.0))


async def answer(connection: BulkConnection, *buffers: bytes) -> CoveyError | None:
    """What the server says to some bytes: an error, or None for a frame that is none."""

    def run() -> CoveyError | None:
        try:
            connection.send(buffers)
            connection.receive(*Kind)
        except CoveyError as error:
            return error
        return None

    return await to_thread.run_sync(run)


async def reserved(process: StoreProcess) -> tuple[ReserveReply, BlockHash]:
    name = BlockHash(secrets.token_bytes(16))
    request = ReserveRequest(
        tenant=TenantId("t"), namespace=NamespaceId(secrets.token_bytes(16)), blocks=(BlockKey(hash=name),),
        shape=SHAPE, owner="writer", ttl_s=5.0,
    )  # fmt: skip
    async with Channels.open() as channels:
        reply = await channels.to(process.address).call(KvStore.RESERVE, request, timeout_s=5)
    assert reply.grants[0].status is GrantStatus.GRANTED
    return reply, name


def write_frame(tenant: str, lease: str, name: bytes) -> bytes:
    head = encode(WriteChunk(tenant=TenantId(tenant), lease=LeaseId(lease), hash=BlockHash(name), offset=0, data=b""))
    return bulk_frame.pack(Kind.WRITE, len(head)) + head


async def is_up(process: StoreProcess) -> bool:
    async with Channels.open() as channels:
        await channels.to(process.address).call(KvStore.STATS, Empty(), timeout_s=5)
    return True


@pytest.mark.parametrize(
    ("header", "error", "field"),
    [
        (HEADER.pack(b"HTTP", 1, Kind.READ, 0, 8), InvalidArgument, "magic"),
        (HEADER.pack(b"CVBK", 2, Kind.READ, 0, 8), InvalidArgument, "version"),
        (HEADER.pack(b"CVBK", 1, 99, 0, 8), InvalidArgument, "kind"),
        (HEADER.pack(b"CVBK", 1, Kind.READ, 7, 8), InvalidArgument, "reserved"),
        (HEADER.pack(b"CVBK", 1, Kind.READ, 0, 1 << 31), PayloadTooLarge, "length"),
        (HEADER.pack(b"CVBK", 1, Kind.READ, 0, 0), InvalidArgument, "length"),
        (HEADER.pack(b"CVBK", 1, Kind.DATA, 0, 8), InvalidArgument, "kind"),
    ],
)
async def test_a_frame_that_does_not_fit_is_refused_by_type_and_ends_the_connection(
    header: bytes, error: type[CoveyError], field: str, bulk: StoreProcess
) -> None:
    connection = await connected(bulk)
    found = await answer(connection, header, b"12345678")
    assert isinstance(found, error)
    assert found.field == field
    assert isinstance(await answer(connection, b""), Unavailable), "the connection is closed"
    connection.close()
    assert await is_up(bulk)


async def test_without_the_mesh_token_nothing_is_served_and_the_token_is_never_sent(tmp_path: Path) -> None:
    secret, former = secrets.token_hex(16), secrets.token_hex(16)
    file = tmp_path / "token"
    file.write_text(f"{secret}\n{former}\n")
    file.chmod(0o600)
    token = MeshToken(secret)
    with store_process(tmp_path, f"mesh_token_file={file}") as process:
        async with Channels.open(token=token) as channels:
            info = await channels.to(process.address).call(KvStore.INFO, Empty(), timeout_s=5)

        def connect(known: Token | None) -> None:
            BulkConnection(info.bulk_address, known, stall_s=5.0).close()

        for right in (token, MeshToken(former)):
            await to_thread.run_sync(connect, right)
        for wrong in (MeshToken(secrets.token_hex(16)), None):
            with pytest.raises(Unauthenticated):
                await to_thread.run_sync(connect, wrong)
    heard = await to_thread.run_sync(overheard, token)
    assert len(heard) == HEADER.size + 2 * NONCE_BYTES
    assert secret.encode() not in heard
    assert token.keys()[0] not in heard


def overheard(token: Token) -> bytes:
    """What a client sends to somebody who only pretends to be a server, until it finds that out."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5.0)
        heard: list[bytes] = []
        with anyio.from_thread.start_blocking_portal() as portal:

            def pretend() -> None:
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(5.0)
                    peer.sendall(bulk_frame.pack(Kind.CHALLENGE, NONCE_BYTES) + bytes(NONCE_BYTES))
                    while sum(map(len, heard)) < HEADER.size + 2 * NONCE_BYTES:
                        heard.append(peer.recv(4096))
                    peer.sendall(bulk_frame.pack(Kind.WELCOME, NONCE_BYTES) + bytes(NONCE_BYTES))

            future = portal.start_task_soon(to_thread.run_sync, pretend)
            with pytest.raises(Unauthenticated):
                BulkConnection(f"127.0.0.1:{listener.getsockname()[1]}", token, stall_s=5.0)
            future.result(5.0)
        return b"".join(heard)


async def test_a_lease_that_is_not_there_or_another_tenants_reads_nothing(bulk: StoreProcess) -> None:
    reply, name = await reserved(bulk)
    for tenant, lease in (("t", "no-such-lease"), ("other", reply.lease.lease)):
        connection = await connected(bulk)
        data = encode(GetRequest(tenant=TenantId(tenant), lease=LeaseId(lease), hashes=(name,)))
        for _ in range(2):
            found = await answer(connection, bulk_frame.pack(Kind.READ, len(data)), data)
            assert isinstance(found, LeaseExpired), "and the connection is as good as before"
        found = await answer(connection, write_frame(tenant, lease, name))
        assert isinstance(found, LeaseExpired | Fenced)
        connection.close()


async def test_more_bytes_than_a_block_has_are_refused_and_nothing_is_visible(bulk: StoreProcess) -> None:
    reply, name = await reserved(bulk)
    connection = await connected(bulk)
    head = write_frame("t", reply.lease.lease, name)
    found = await answer(connection, head, bulk_frame.pack(Kind.DATA, SHAPE.size_bytes + 1), b"x" * 4096)
    assert isinstance(found, InvalidArgument)
    connection.close()
    async with Channels.open() as channels:
        stats = await channels.to(bulk.address).call(KvStore.STATS, Empty(), timeout_s=5)
    assert stats.blocks == 0


async def test_a_writer_that_is_cut_off_leaves_nothing(bulk: StoreProcess) -> None:
    reply, name = await reserved(bulk)
    connection = await connected(bulk)
    half = write_frame("t", reply.lease.lease, name) + bulk_frame.pack(Kind.DATA, SHAPE.size_bytes)
    await to_thread.run_sync(connection.send, (half, bytes(SHAPE.size_bytes // 2)))
    connection.close()

    async def ended() -> bool:
        async with Channels.open() as channels:
            stats = await channels.to(bulk.address).call(KvStore.STATS, Empty(), timeout_s=5)
        return (stats.blocks, stats.reserved_blocks) == (0, 0)

    await assert_eventually(ended, 8.0)


async def test_a_peer_that_stands_still_is_hung_up_on(bulk: StoreProcess) -> None:
    blocks, data = [BlockKey(hash=BlockHash(secrets.token_bytes(16)))], memoryview(bytes(16 << 20))
    shape = BlockShape(size_bytes=data.nbytes, layers=4)
    key = StoreKey(tenant=TenantId("t"), namespace=NamespaceId(secrets.token_bytes(16)), shape=shape)
    async with Channels.open() as channels:
        client = client_of(bulk, channels, "tcp")
        await (await client.store(key, blocks, [data], owner="w", ttl_s=20.0)).release()
        held = await client.lookup(key, [blocks[0].hash], owner="r", ttl_s=20.0)
        connection = await connected(bulk)
        names = (blocks[0].hash,)
        request = GetRequest(tenant=key.tenant, lease=held.grant.lease, hashes=names)  # type: ignore[attr-defined]
        await to_thread.run_sync(connection.request, Kind.READ, request)
        with anyio.fail_after(20 * STALL_S):
            with pytest.raises(Unavailable):
                while True:  # a sip at a time, far apart: the server sees no progress, and ends it
                    await anyio.sleep(3 * STALL_S)
                    await to_thread.run_sync(connection.take, 12 << 20)
        connection.close()
        await held.release()


async def test_connections_are_bounded(bulk: StoreProcess) -> None:
    open_: list[BulkConnection] = []
    try:
        with pytest.raises(Overloaded):
            for _ in range(5):
                open_.append(await connected(bulk))
    finally:
        for connection in open_:
            connection.close()

    async def free() -> bool:
        try:
            (await connected(bulk)).close()
        except Overloaded:
            return False
        return True

    await assert_eventually(free, 5.0)


@contextmanager
def plain(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as connection:
        yield connection


def conversation(address: str, said: Callable[[bytes], bytes]) -> list[CoveyError]:
    """Say something after the challenge, end our side, and return the errors that came before the end."""
    with plain(address) as connection:
        stream = connection.makefile("rb")
        stream.read(HEADER.size)
        nonce = stream.read(NONCE_BYTES)
        try:
            connection.sendall(said(nonce))
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            return []  # it was refused before all was sent
        errors = []
        while len(data := stream.read(HEADER.size)) == HEADER.size:
            frame = bulk_frame.unpack(data)
            payload = stream.read(frame.length)
            if frame.kind is Kind.ERROR:
                errors.append(decode_error(payload))
        assert not data, "the server sends whole frames"
        return errors


def proof(nonce: bytes) -> bytes:
    mine = bytes(NONCE_BYTES)
    return bulk_frame.pack(Kind.PROOF, 2 * NONCE_BYTES) + mine + bulk_frame.client_proof(b"", nonce, mine)


frames = st.builds(
    lambda kind, length, payload: HEADER.pack(b"CVBK", 1, kind, 0, length) + payload,
    st.integers(0, 12),
    st.integers(0, 1 << 22) | st.integers(0, 64),
    st.binary(max_size=200),
)
requests = st.builds(
    lambda hashes, first, last: encode(
        GetRequest(tenant=TenantId("t"), lease=LeaseId("x"), hashes=tuple(hashes), first_layer=first, last_layer=last)
    ),
    st.lists(st.binary(min_size=16, max_size=16).map(BlockHash), max_size=3),
    st.integers(0, 9),
    st.integers(0, 9),
).map(lambda data: bulk_frame.pack(Kind.READ, len(data)) + data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shaken=st.booleans(), parts=st.lists(frames | requests | st.binary(max_size=64), max_size=4), cut=st.integers(0))
def test_whatever_is_sent_is_answered_by_type_or_not_at_all(
    shaken: bool, parts: list[bytes], cut: int, bulk: StoreProcess
) -> None:
    address = anyio.run(address_of, bulk)

    def said(nonce: bytes) -> bytes:
        data = (proof(nonce) if shaken else b"") + b"".join(parts)
        return data[: len(data) - cut % (len(data) + 1)] if cut % 3 == 0 else data

    for error in conversation(address, said):
        assert isinstance(error, REFUSALS)
    assert anyio.run(is_up, bulk)


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_a_header_is_understood_or_refused_by_type(data: bytes) -> None:
    try:
        frame = bulk_frame.unpack(data)
    except (InvalidArgument, PayloadTooLarge):
        return
    assert bulk_frame.pack(frame.kind, frame.length) == data


def test_every_kind_has_bounds_that_its_length_field_can_hold() -> None:
    assert set(bulk_frame.LENGTHS) == set(Kind)
    for shortest, longest in bulk_frame.LENGTHS.values():
        assert 0 <= shortest <= longest < 2**32
        struct.pack("<I", longest)
