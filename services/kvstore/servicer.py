"""The RPCs of a kvstore: thin, each is a command to the actor that owns the store, bytes aside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

from anyio import to_thread

from covey.actor import Ref
from covey.codec.methods import KvStore
from covey.errors import DataCorrupt, NoSpace
from covey.net.kv.copying import checksums
from covey.net.kv.reading import layer_range
from covey.net.rpc import Call, Handlers
from covey.policy.slot import SlotHeader
from covey.policy.store_index import Placed
from covey.types import kv
from covey.types.common import Empty
from covey.types.ids import LeaseId, NamespaceId, TenantId

from .event_log import SCHEMA
from .store import Command, Store
from .tasks import Tasks

R = TypeVar("R")

COMMAND_TIMEOUT_S = 5.0
STREAMED_MAX = 65_536
"""Blocks written over gRPC and not yet committed whose bytes are checked at commit."""


class Servicer:
    """Handlers over one store."""

    def __init__(self, store: Store, actor: Ref[Command[object]], info: kv.StoreInfo, tasks: Tasks) -> None:
        self._store = store
        self._actor = actor
        self._info = info
        self._tasks = tasks
        self._streamed: dict[tuple[str, bytes], None] = {}

    def handlers(self) -> Handlers:
        return {
            KvStore.INFO: self.info,
            KvStore.LOOKUP: self.lookup,
            KvStore.RESERVE: self.reserve,
            KvStore.WRITE: self.write,
            KvStore.COMMIT: self.commit,
            KvStore.ABORT: self.release,
            KvStore.GET: self.get,
            KvStore.RENEW: self.renew,
            KvStore.RELEASE: self.release,
            KvStore.PIN: self.pin,
            KvStore.QUARANTINE: self.quarantine,
            KvStore.WATCH: self.watch,
            KvStore.SNAPSHOT: self.snapshot,
            KvStore.STATS: self.stats,
            KvStore.START: self.start,
            KvStore.GET_TASK: self.get_task,
            KvStore.CANCEL_TASK: self.cancel_task,
            KvStore.QUOTA: self.quota,
        }

    async def info(self, _: Empty, __: Call) -> kv.StoreInfo:
        return self._info

    async def lookup(self, request: kv.LookupRequest, call: Call) -> kv.LookupReply:
        return await self._do(call, lambda store, now: store.index.lookup(request, now))

    async def reserve(self, request: kv.ReserveRequest, call: Call) -> kv.ReserveReply:
        reply, unbacked = await self._do(call, partial(_reserve, request))
        if unbacked:
            try:
                await to_thread.run_sync(self._back, unbacked)
            except NoSpace:
                lease = kv.LeaseRequest(lease=reply.lease.lease, epoch=reply.lease.epoch)
                await self._do(call, lambda store, now: store.index.release(lease, now))
                raise
            await self._do(call, lambda store, now: store.mark(reply, now))
        return reply

    async def write(self, chunks: AsyncIterator[kv.WriteChunk], call: Call) -> kv.WriteReply:
        total = 0
        async for chunk in chunks:
            if len(self._streamed) >= STREAMED_MAX:
                del self._streamed[next(iter(self._streamed))]
            self._streamed[chunk.lease, chunk.hash] = None
            total += await self._do(call, partial(_write, chunk))
        return kv.WriteReply(size_bytes=total)

    async def commit(self, request: kv.CommitRequest, call: Call) -> kv.CommitReply:
        """Commit; blocks that came over gRPC are checked first, for a stream may have ended early."""
        for block in request.blocks:
            if (request.lease, block.hash) in self._streamed:
                del self._streamed[request.lease, block.hash]
                await self._check_streamed(request.lease, block, call)
        return await self._do(call, lambda store, now: store.commit(request, now))

    async def get(self, request: kv.GetRequest, call: Call) -> AsyncIterator[kv.BlockChunk]:
        placed = await self._do(call, partial(_locate, request))
        for first, last in _passes(request, placed[0].shape.layers if placed else 1):
            for slot in placed:
                layers = layer_range(slot.shape, first, last or slot.shape.layers)
                sums = (await self._header(slot, call)).checksums if first == request.first_layer else ()
                for at in range(layers.start, layers.end, kv.CHUNK_BYTES_MAX):
                    # Before each piece: the lease may have ended while a slow reader took the last one.
                    await self._do(call, partial(_check_lease, request))
                    data = bytes(self._store.payload(slot)[at : min(layers.end, at + kv.CHUNK_BYTES_MAX)])
                    yield kv.BlockChunk(hash=slot.location.hash, offset=at, data=data, checksums=sums)
                    sums = ()

    async def renew(self, request: kv.RenewRequest, call: Call) -> kv.LeaseGrant:
        return await self._do(call, lambda store, now: store.index.renew(request, now))

    async def release(self, request: kv.LeaseRequest, call: Call) -> Empty:
        await self._do(call, lambda store, now: store.index.release(request, now))
        return Empty()

    async def pin(self, request: kv.PinRequest, call: Call) -> kv.PinReply:
        return await self._do(call, lambda store, now: store.index.pin(request, now))

    async def quarantine(self, request: kv.QuarantineRequest, call: Call) -> Empty:
        await self._do(call, lambda store, now: store.index.quarantine(request, now))
        return Empty()

    async def watch(self, request: kv.WatchKvRequest, call: Call) -> AsyncIterator[kv.KvEvent]:
        """Yield events; a snapshot is one CLEARED and then STORED events, all numbered as the event they follow."""
        log, epoch, seq = self._store.log, request.epoch, request.seq
        while not log.closed:
            if not log.can_follow(epoch, seq):
                snapshot = await self._do(call, lambda store, _: store.snapshot())
                epoch, seq = snapshot.epoch, snapshot.seq
                for event in _as_events(snapshot):
                    yield event
            for event in tuple(log.after(seq)):
                yield event
                seq = event.seq
            await log.changed(seq)

    async def snapshot(self, _: Empty, call: Call) -> kv.KvSnapshot:
        return await self._do(call, lambda store, _: store.snapshot())

    async def stats(self, _: Empty, __: Call) -> kv.StoreStats:
        return self._store.index.stats()

    async def start(self, request: kv.StartTask, _: Call) -> kv.TaskStatus:
        return self._tasks.start(request)

    async def get_task(self, request: kv.TaskRequest, _: Call) -> kv.TaskStatus:
        return self._tasks.get(request.task)

    async def cancel_task(self, request: kv.TaskRequest, _: Call) -> kv.TaskStatus:
        return self._tasks.cancel(request.task)

    async def quota(self, request: kv.QuotaRequest, call: Call) -> kv.QuotaReply:
        return await self._do(call, lambda store, _: store.index.quota(request))

    async def _do(self, call: Call, act: Callable[[Store, float], R]) -> R:
        return await self._actor.ask(Command(act=act), timeout_s=call.within(COMMAND_TIMEOUT_S))

    def _back(self, slots: list[Placed]) -> None:
        for slot in slots:
            self._store.back(slot)

    async def _check_streamed(self, lease: str, block: kv.CommitBlock, call: Call) -> None:
        slot = await self._do(call, lambda store, now: store.index.writable(LeaseId(lease), block.hash, now))
        found = await to_thread.run_sync(checksums, self._store.payload(slot), slot.shape)
        if found != block.checksums:
            raise DataCorrupt("the bytes that were written do not have these checksums", field="blocks")

    async def _header(self, slot: Placed, call: Call) -> SlotHeader:
        try:
            return self._store.header(slot)
        except DataCorrupt as error:
            await self._condemn(slot, error.message, call)
            raise

    async def _condemn(self, slot: Placed, reason: str, call: Call) -> None:
        request = kv.QuarantineRequest(
            tenant=TenantId(""), namespace=slot.namespace, hash=slot.location.hash, reason=reason
        )
        await self._do(call, lambda store, now: store.index.quarantine(request, now))


def _reserve(request: kv.ReserveRequest, store: Store, now: float) -> tuple[kv.ReserveReply, list[Placed]]:
    reply = store.reserve(request, now)
    return reply, store.unbacked(reply, now)


def _write(chunk: kv.WriteChunk, store: Store, now: float) -> int:
    return store.write(chunk, now)


def _locate(request: kv.GetRequest, store: Store, now: float) -> tuple[Placed, ...]:
    return store.index.locate(request.lease, request.hashes, now)


def _check_lease(request: kv.GetRequest, store: Store, now: float) -> None:
    store.index.locate(request.lease, (), now)


def _passes(request: kv.GetRequest, layers: int) -> list[tuple[int, int]]:
    """Return the layers of each pass over the blocks; 0 as an end is each block's own."""
    if not request.by_layer:
        return [(request.first_layer, request.last_layer)]
    return [(layer, layer + 1) for layer in range(request.first_layer, request.last_layer or layers)]


def _as_events(snapshot: kv.KvSnapshot) -> list[kv.KvEvent]:
    def event(kind: kv.KvEventKind, entry: kv.KvSnapshotEntry) -> kv.KvEvent:
        return kv.KvEvent(
            epoch=snapshot.epoch,
            seq=snapshot.seq,
            schema=SCHEMA,
            worker=snapshot.worker,
            kind=kind,
            namespace=entry.namespace,
            hashes=entry.hashes,
        )

    nothing = kv.KvSnapshotEntry(namespace=NamespaceId(b""))
    stored = (event(kv.KvEventKind.STORED, entry) for entry in snapshot.entries)
    return [event(kv.KvEventKind.CLEARED, nothing), *stored]
