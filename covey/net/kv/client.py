"""The store over all its nodes: `BlockStore` for engines, by shared memory or gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import anyio
from anyio import CapacityLimiter

from covey.clock import Clock
from covey.codec.methods import KvStore
from covey.errors import CoveyError, Fenced, InvalidArgument, LeaseExpired, Miss, Pending, Unavailable
from covey.net.kv.held import NothingHeld, StoreHeld, enter
from covey.net.kv.node import ChannelSource, Node, StoreNode
from covey.net.kv.partial import Partial
from covey.net.kv.reading import Reading
from covey.net.kv.ring import Ring, RingSettings, no_ring
from covey.net.kv.shared import SharedMemory
from covey.net.kv.stream import GrpcStream
from covey.net.kv.transport import Transport
from covey.types.ids import BlockHash
from covey.types.kv import (
    BlockKey,
    CommitRequest,
    GrantStatus,
    LookupRequest,
    PinKind,
    PinRequest,
    QuarantineRequest,
    ReserveReply,
    ReserveRequest,
    RingVersion,
)
from covey.types.store import Held, Ready, StoreKey

PENDING_WAIT_S = 0.02
"""Between two looks at a block that another writer fills."""

LOADER = "load"
"""Owner of the lease under which blocks of a writer's lease or a pin are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvClientConfig:
    """How a client reaches the store. `grpc` never maps arenas; `auto` does where it can."""

    transport: Literal["auto", "grpc"] = "auto"
    call_timeout_s: float = 1.0
    transfer_timeout_s: float = 60.0
    nodes_tried: int = 2
    """How many nodes, in a chain's order of preference, an operation asks when they do not answer."""
    roots_max: int = 65_536
    """Blocks whose chain is remembered, so that a later part of a chain goes where its start is."""
    settling_s: float = 30.0
    """How long after a change of the ring, or a node's silence, blocks are also looked for where they were before."""
    copies_max: int = 2
    """Threads that copy at a time."""


class KvClient:
    """Blocks by name over the nodes there are. A whole chain lives on one node, chosen by its first hash.

    Ask for a chain from its first block on; a part that starts later must continue what this client has looked
    up or stored. A node that is gone is a miss for readers, and writers go on to the next one.
    """

    def __init__(
        self, nodes: Callable[[], Sequence[StoreNode]], channels: ChannelSource, *, clock: Clock, boot_id: str,
        config: KvClientConfig | None = None, agreed: Callable[[], RingVersion | None] = no_ring,
    ) -> None:  # fmt: skip
        """`nodes` returns who is there now, `agreed` who owns blocks; `boot_id` is this host's."""
        self._config = config or KvClientConfig()
        self._clock = clock
        self._ring = Ring(
            nodes,
            channels,
            clock=clock,
            boot_id=boot_id if self._config.transport == "auto" else "",
            agreed=agreed,
            settings=RingSettings(
                timeout_s=self._config.call_timeout_s,
                nodes_tried=self._config.nodes_tried,
                roots_max=self._config.roots_max,
                settling_s=self._config.settling_s,
            ),
        )
        self._copies = CapacityLimiter(self._config.copies_max)

    # -- BlockStore --------------------------------------------------------------

    async def lookup(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Lease the longest stored prefix of `hashes`; nodes that do not answer are a miss."""
        if not hashes:
            return NothingHeld()
        root = self._ring.root(key.namespace, hashes[0])
        for node in self._ring.readers(key.namespace, root):
            try:
                held = await self._lookup_at(node, key, tuple(hashes), owner, ttl_s)
            except Unavailable:
                self._ring.unsettle()
                continue
            if held is not None:
                self._ring.remember(key.namespace, held.hashes, root)
                return held
            if self._ring.is_settled:
                break
        return NothingHeld()

    async def load(self, held: Held, into: Sequence[memoryview], *, ready: Ready | None = None) -> int:
        """Copy leased blocks into buffers, verified; return how many leading ones are good. Raises `LeaseExpired`.

        With `ready`, layer by layer over all blocks.
        """
        if not isinstance(held, StoreHeld):
            return 0
        held.check()
        if len(held.locations) < len(held.hashes):  # a writer's lease or a pin says what it covers, not where
            return await self._load_anew(held, into, ready)
        size_bytes, count = held.key.shape.size_bytes, min(len(held.locations), len(into))
        buffers = [_flat(view, size_bytes, f"into[{i}]") for i, view in enumerate(into[:count])]
        partial = Partial(held, buffers, ready)
        expired: LeaseExpired | None = None
        try:
            await self._load_from(held, partial)
        except LeaseExpired as error:
            expired = error
        if not partial.is_whole:
            await self._load_elsewhere(held, partial)
        if expired is not None and not partial.is_whole:
            raise expired
        return partial.good

    async def store(
        self, key: StoreKey, blocks: Sequence[BlockKey], data: Sequence[memoryview], *, owner: str, ttl_s: float,
        private: bool = False,
    ) -> Held:  # fmt: skip
        """Write blocks that are not there yet and lease them all.

        Waits, for at most `ttl_s`, for blocks that another client is writing, and takes over if it dies. Raises
        `NoSpace`, `QuotaExceeded` and `Unavailable`; then nothing stays reserved.
        """
        if len(blocks) != len(data):
            raise InvalidArgument("each block needs its data", field="data")
        if not blocks:
            return NothingHeld()
        buffers = [_flat(view, key.shape.size_bytes, f"data[{i}]") for i, view in enumerate(data)]
        request = ReserveRequest(
            tenant=key.tenant,
            namespace=key.namespace,
            blocks=tuple(blocks),
            shape=key.shape,
            owner=owner,
            ttl_s=ttl_s,
            private=private,
        )
        root = self._ring.root(key.namespace, blocks[0].parent or blocks[0].hash)
        problem: CoveyError = Unavailable("no kvstore takes blocks")
        for node in self._ring.writers(key.namespace, root):
            try:
                held = await self._store_at(node, key, request, buffers)
            except Unavailable as error:
                self._ring.unsettle()
                problem = error
                continue
            except (Miss, Pending) as error:
                raise Unavailable(f"not stored: {error.message}") from error
            self._ring.remember(key.namespace, held.hashes, root)
            return held
        raise problem

    async def pin(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Keep the stored prefix of `hashes` from eviction for `ttl_s` seconds; nothing stored is nothing held."""
        if not hashes:
            return NothingHeld()
        request = PinRequest(
            tenant=key.tenant,
            namespace=key.namespace,
            hashes=tuple(hashes),
            kind=PinKind.HARD,
            ttl_s=ttl_s,
            owner=owner,
        )
        for node in self._ring.readers(key.namespace, self._ring.root(key.namespace, hashes[0])):
            asked_at = self._clock.now()
            try:
                reply = await enter(node, KvStore.PIN, request)
            except Unavailable:
                self._ring.unsettle()
                continue
            except Miss:
                if self._ring.is_settled:
                    break
                continue
            return StoreHeld(
                node=node,
                key=key,
                grant=reply.lease,
                asked_at=asked_at,
                clock=self._clock,
                hashes=request.hashes[: reply.blocks],
            )
        return NothingHeld()

    # -- one node ----------------------------------------------------------------

    async def _load_anew(self, held: StoreHeld, into: Sequence[memoryview], ready: Ready | None) -> int:
        try:
            reader = await self._lookup_at(held.node, held.key, held.hashes, LOADER, held.grant.ttl_s)
        except Unavailable:
            return 0
        if reader is None:
            return 0
        try:
            return await self.load(reader, into, ready=ready)
        finally:
            await reader.release()

    async def _load_from(self, held: StoreHeld, partial: Partial) -> None:
        """Read what is missing, as far as this lease covers it. Raises `LeaseExpired`."""
        buffers = partial.buffers(len(held.hashes))
        reading = Reading(buffers, held.key.shape, partial.ready(len(buffers)))
        try:
            transport = await self._transport(held)
        except CoveyError:
            return
        await transport.load(held, reading)
        if reading.fault:
            await held.confirm()  # a store that started anew has other blocks where these were
            await self._quarantine(held, held.hashes[reading.good], reading.fault)
        partial.add(buffers, reading.good)

    async def _load_elsewhere(self, held: StoreHeld, partial: Partial) -> None:
        """Go on from the first missing block at the other nodes that may hold the chain."""
        root = self._ring.root(held.key.namespace, held.hashes[0])
        for node in self._ring.readers(held.key.namespace, root):
            if partial.is_whole:
                return
            if node.where.worker == held.node.where.worker:
                continue
            try:
                other = await self._lookup_at(node, held.key, partial.hashes, LOADER, held.grant.ttl_s)
            except Unavailable:
                self._ring.unsettle()
                continue
            if other is None:
                continue
            try:
                await self._load_from(other, partial)
            except LeaseExpired:
                continue
            finally:
                await other.release()

    async def _lookup_at(
        self, node: Node, key: StoreKey, hashes: tuple[BlockHash, ...], owner: str, ttl_s: float
    ) -> StoreHeld | None:
        request = LookupRequest(
            tenant=key.tenant, namespace=key.namespace, hashes=hashes, owner=owner, ttl_s=ttl_s, shape=key.shape
        )
        asked_at = self._clock.now()
        reply = await enter(node, KvStore.LOOKUP, request)
        if reply.lease is None:
            return None
        return StoreHeld(
            node=node,
            key=key,
            grant=reply.lease,
            asked_at=asked_at,
            clock=self._clock,
            hashes=reply.blocks.names,
            locations=reply.blocks,
        )

    async def _store_at(
        self, node: Node, key: StoreKey, request: ReserveRequest, data: Sequence[memoryview]
    ) -> StoreHeld:
        """Write what is granted, round by round while other writers hold some of it; return one lease over all."""
        give_up_at = self._clock.now() + request.ttl_s
        held: list[StoreHeld] = []
        done = 0
        try:
            while True:
                rest = replace(request, blocks=request.blocks[done:])
                asked_at = self._clock.now()
                reply = await enter(node, KvStore.RESERVE, rest)
                names = _until_pending(reply)
                held.append(
                    StoreHeld(node=node, key=key, grant=reply.lease, asked_at=asked_at, clock=self._clock, hashes=names)
                )
                await self._fill(held[-1], reply, data[done:])
                done += len(names)
                if done == len(request.blocks):
                    break
                if not names:
                    await held.pop().release()
                if self._clock.now() >= give_up_at:
                    raise Pending("another writer holds these blocks and does not finish")
                await anyio.sleep(PENDING_WAIT_S)
            return await self._as_one(held, request)
        except BaseException:
            with anyio.CancelScope(shield=True):
                for each in held:
                    await each.release()
            raise

    async def _fill(self, held: StoreHeld, reply: ReserveReply, data: Sequence[memoryview]) -> None:
        """Write and commit the granted slots of one reservation."""
        granted = [(grant, data[i]) for i, grant in enumerate(reply.grants) if grant.status is GrantStatus.GRANTED]
        if not granted:
            return
        try:
            transport = await self._transport(held)
            blocks = await transport.store(held, [grant for grant, _ in granted], [view for _, view in granted])
            request = CommitRequest(lease=held.grant.lease, epoch=held.grant.epoch, blocks=tuple(blocks))
            held.check()
            await held.node.call(KvStore.COMMIT, request)
        except (LeaseExpired, Fenced) as error:
            raise Unavailable("the write took longer than its lease, or the store started anew") from error

    async def _transport(self, held: StoreHeld) -> Transport:
        """Return what reaches the node best. Raises `Unavailable` when it does not answer."""
        mapping = await held.node.mapping(held.grant.epoch)
        if mapping is not None:
            return SharedMemory(mapping, self._copies)
        return GrpcStream(timeout_s=self._config.transfer_timeout_s, limiter=self._copies)

    async def _as_one(self, held: list[StoreHeld], request: ReserveRequest) -> StoreHeld:
        """Return one fresh lease in place of several rounds' leases."""
        if len(held) == 1:
            return held[0]
        names = tuple(block.hash for block in request.blocks)
        whole = await self._lookup_at(held[0].node, held[0].key, names, request.owner, request.ttl_s)
        if whole is None or whole.hashes != names:
            if whole is not None:
                await whole.release()
            raise Unavailable("some of these blocks were lost while others were written")
        for each in held:
            await each.release()
        return whole

    async def _quarantine(self, held: StoreHeld, name: BlockHash, reason: str) -> None:
        request = QuarantineRequest(
            tenant=held.key.tenant, namespace=held.key.namespace, hash=name, reason=reason[:256]
        )
        try:
            await held.node.call(KvStore.QUARANTINE, request)
        except CoveyError:
            return  # the node is gone, and the bad block with it


def _until_pending(reply: ReserveReply) -> tuple[BlockHash, ...]:
    names = []
    for grant in reply.grants:
        if grant.status is GrantStatus.PENDING:
            break
        names.append(grant.hash)
    return tuple(names)


def _flat(view: memoryview, size_bytes: int, field: str) -> memoryview:
    """Return a view as contiguous bytes. Raises `InvalidArgument` when it has another size."""
    if view.nbytes != size_bytes or not view.c_contiguous:
        raise InvalidArgument(
            f"a buffer of {size_bytes} contiguous bytes is needed, this has {view.nbytes}", field=field
        )
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
