"""Operations on one node of the store: look up, read, write, quarantine, by the best transport there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import anyio
from anyio import CapacityLimiter, to_thread

from covey import failpoint
from covey.clock import Clock
from covey.codec.methods import KvStore
from covey.compression import Codecs
from covey.errors import CoveyError, Fenced, LeaseExpired, Pending, Unavailable
from covey.net.kv.bulk import BulkTcp
from covey.net.kv.config import KvClientConfig
from covey.net.kv.decoding import Decoding
from covey.net.kv.held import StoreHeld, enter
from covey.net.kv.mapping import stored_shape
from covey.net.kv.node import Node
from covey.net.kv.partial import Partial
from covey.net.kv.reading import Reading
from covey.net.kv.shared import SharedMemory
from covey.net.kv.stream import GrpcStream
from covey.net.kv.transport import Transport
from covey.types.ids import BlockHash
from covey.types.kv import CommitRequest, GrantStatus, LookupRequest, QuarantineRequest, ReserveReply, ReserveRequest
from covey.types.store import StoreKey

PENDING_WAIT_S = 0.02
"""Between two looks at a block that another writer fills."""


class Access:
    """What one client does at a node that it has chosen; the threads are shared by all nodes."""

    def __init__(self, config: KvClientConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._copies = CapacityLimiter(config.copies_max)
        self._codecs = Codecs(config.codebook)
        self._bulk_threads = CapacityLimiter(config.bulk_threads_max)

    async def lookup(
        self, node: Node, key: StoreKey, hashes: tuple[BlockHash, ...], owner: str, ttl_s: float
    ) -> StoreHeld | None:
        """Lease the longest prefix that the node has, None when it has nothing. Raises `Unavailable`."""
        request = LookupRequest(
            tenant=key.tenant, namespace=key.namespace, hashes=hashes, owner=owner, ttl_s=ttl_s, shape=key.shape,
            codecs=self._config.codecs, wait_s=self._config.cold_wait_s,
        )  # fmt: skip
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

    async def load(self, held: StoreHeld, partial: Partial) -> None:
        """Read what is missing, as far as this lease covers it. Raises `LeaseExpired`."""
        buffers = partial.buffers(len(held.hashes))
        shapes = [stored_shape(held.locations[i], held.key.shape) for i in range(len(buffers))]
        decoding = Decoding(self._codecs, held.key.shape, held.locations[: len(buffers)], buffers)
        ready = None if decoding.is_needed else partial.ready(len(buffers))
        reading = Reading(decoding.buffers, shapes, ready)
        try:
            transport = await self._transport(held)
        except CoveyError:
            return
        await transport.load(held, reading)
        if decoding.is_needed:
            await to_thread.run_sync(decoding.run, reading, limiter=self._copies)
        if reading.fault:
            await held.confirm()  # a store that started anew has other blocks where these were
            await self._quarantine(held, held.hashes[reading.good], reading.fault)
        partial.add(buffers, reading.good)

    async def store(self, node: Node, key: StoreKey, request: ReserveRequest, data: Sequence[memoryview]) -> StoreHeld:
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
            request = CommitRequest(
                tenant=held.key.tenant, lease=held.grant.lease, epoch=held.grant.epoch, blocks=tuple(blocks)
            )
            held.check()
            await failpoint.hit_async("kv.before_commit")
            await held.node.call(KvStore.COMMIT, request)
        except (LeaseExpired, Fenced) as error:
            raise Unavailable("the write took longer than its lease, or the store started anew") from error

    async def _transport(self, held: StoreHeld) -> Transport:
        """Return what reaches the node best, or what is configured. Raises `Unavailable` when it cannot be had."""
        choice, epoch = self._config.transport, held.grant.epoch
        if choice in {"auto", "shm"}:
            mapping = await held.node.mapping(epoch)
            if mapping is not None:
                return SharedMemory(mapping, self._copies)
        if choice in {"auto", "tcp"}:
            pool = await held.node.bulk(epoch)
            if pool is not None and await pool.works(self._bulk_threads):
                return BulkTcp(pool, self._bulk_threads, self._clock)
        if choice in {"auto", "grpc"}:
            return GrpcStream(
                timeout_s=self._config.transfer_timeout_s, stall_s=self._config.stall_timeout_s, limiter=self._copies
            )
        raise Unavailable(f"kvstore {held.node.where.worker} is not reached by {choice} from here")

    async def _as_one(self, held: list[StoreHeld], request: ReserveRequest) -> StoreHeld:
        """Return one fresh lease in place of several rounds' leases."""
        if len(held) == 1:
            return held[0]
        names = tuple(block.hash for block in request.blocks)
        whole = await self.lookup(held[0].node, held[0].key, names, request.owner, request.ttl_s)
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
