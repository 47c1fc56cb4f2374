"""The RPCs of a kvstore: thin, each is a command to the actor that owns the store, bytes aside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

from anyio import to_thread

from covey.actor import Ref
from covey.codec.methods import KvStore
from covey.errors import DataCorrupt, InvalidArgument, NoSpace
from covey.net.rpc import Call, Handlers
from covey.policy.store_index import Placed
from covey.types import kv, kv_state
from covey.types.common import Empty
from covey.types.ids import TenantId

from .meshed import Meshed
from .store import Command, Store
from .tasks import Tasks
from .tiers.tiers import Tiers
from .transfers import Transfers
from .watching import Watching

R = TypeVar("R")

COMMAND_TIMEOUT_S = 5.0


class Servicer:
    """Handlers over one store."""

    def __init__(
        self, store: Store, actor: Ref[Command[object]], info: kv.StoreInfo, tasks: Tasks, transfers: Transfers,
        tiers: Tiers, meshed: Meshed | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._actor = actor
        self._info = info
        self._tasks = tasks
        self._transfers = transfers
        self._tiers = tiers
        self._meshed = meshed
        self._watching = Watching(store, actor)

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
        """Look up in memory; what is not there is asked of the tiers below, which may bring it up first."""

        async def look_up() -> kv.LookupReply:
            return await self._do(call, lambda store, now: store.index.lookup(request, now))

        reply = await look_up()
        if self._tiers.is_needed(request, reply):
            reply = await self._tiers.look_below(
                request, reply, look_up, within_s=call.within(COMMAND_TIMEOUT_S + request.wait_s)
            )
        return reply

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
            _check_tenant(chunk.tenant)
            total += self._transfers.write(chunk)
        return kv.WriteReply(size_bytes=total)

    async def commit(self, request: kv.CommitRequest, call: Call) -> kv.CommitReply:
        """Commit; blocks that came through the service are checked first, for a stream may have ended early."""
        _check_tenant(request.tenant)
        if request.ack is kv.AckLevel.DURABLE:
            self._tiers.check_durable()
        await self._transfers.verify(request)
        reply = await self._do(call, lambda store, now: store.commit(request, now))
        self._tiers.note_written()
        if request.ack is kv.AckLevel.REPLICATED and self._meshed is not None and request.blocks:
            names = tuple(block.hash for block in request.blocks)
            placed = await self._do(call, lambda store, now: store.index.locate(request.lease, names[:1], now))
            await self._meshed.replication.acknowledge(placed[0].namespace, names)
        if request.ack is kv.AckLevel.DURABLE and request.blocks:
            names = tuple(block.hash for block in request.blocks)
            placed = await self._do(call, lambda store, now: store.index.locate(request.lease, names[:1], now))
            await self._tiers.make_durable(placed[0].namespace, names)
        return reply

    async def get(self, request: kv.GetRequest, call: Call) -> AsyncIterator[kv.BlockChunk]:
        _check_tenant(request.tenant)
        reader = self._transfers.read(request)
        try:
            for piece in reader.pieces(kv.CHUNK_BYTES_MAX):
                yield kv.BlockChunk(hash=piece.hash, offset=piece.offset, data=piece.data, checksums=piece.checksums)
        except DataCorrupt as error:
            if reader.slot is not None:
                await condemn(self._actor, reader.slot, error.message)
            raise

    async def renew(self, request: kv.RenewRequest, call: Call) -> kv.LeaseGrant:
        _check_tenant(request.tenant)
        return await self._do(call, lambda store, now: store.index.renew(request, now))

    async def release(self, request: kv.LeaseRequest, call: Call) -> Empty:
        _check_tenant(request.tenant)
        await self._do(call, lambda store, now: store.index.release(request, now))
        return Empty()

    async def pin(self, request: kv.PinRequest, call: Call) -> kv.PinReply:
        return await self._do(call, lambda store, now: store.index.pin(request, now))

    async def quarantine(self, request: kv.QuarantineRequest, call: Call) -> Empty:
        await self._do(call, lambda store, now: store.index.quarantine(request, now))
        return Empty()

    async def watch(self, request: kv_state.WatchKvRequest, _: Call) -> AsyncIterator[kv_state.KvEvent]:
        async for event in self._watching.watch(request):
            yield event

    async def snapshot(self, _: Empty, __: Call) -> AsyncIterator[kv_state.KvSnapshot]:
        async for page in self._watching.pages():
            yield page

    async def stats(self, _: Empty, __: Call) -> kv_state.StoreStats:
        return self.now()

    def now(self) -> kv_state.StoreStats:
        """Count what is there."""
        stats = self._tiers.stats(self._store.index.stats())
        return stats if self._meshed is None else self._meshed.stats(stats)

    async def start(self, request: kv_state.StartTask, _: Call) -> kv_state.TaskStatus:
        return self._tasks.start(request)

    async def get_task(self, request: kv_state.TaskRequest, _: Call) -> kv_state.TaskStatus:
        return self._tasks.get(request.task)

    async def cancel_task(self, request: kv_state.TaskRequest, _: Call) -> kv_state.TaskStatus:
        return self._tasks.cancel(request.task)

    async def quota(self, request: kv_state.QuotaRequest, call: Call) -> kv_state.QuotaReply:
        return await self._do(call, lambda store, _: store.index.quota(request))

    async def _do(self, call: Call, act: Callable[[Store, float], R]) -> R:
        return await self._actor.ask(Command(act=act), timeout_s=call.within(COMMAND_TIMEOUT_S))

    def _back(self, slots: list[Placed]) -> None:
        for slot in slots:
            self._store.back(slot)


async def condemn(actor: Ref[Command[object]], slot: Placed, reason: str) -> None:
    """Take a block out that was found to be bad."""
    request = kv.QuarantineRequest(
        tenant=TenantId(""), namespace=slot.namespace, hash=slot.location.hash, reason=reason
    )
    await actor.ask(Command(act=lambda store, now: store.index.quarantine(request, now)), timeout_s=COMMAND_TIMEOUT_S)


def _check_tenant(tenant: TenantId) -> None:
    """A lease belongs to a tenant; within this process none means the store itself, on the wire it means nobody."""
    if not tenant:
        raise InvalidArgument("say whose lease this is", field="tenant")


def _reserve(request: kv.ReserveRequest, store: Store, now: float) -> tuple[kv.ReserveReply, list[Placed]]:
    reply = store.reserve(request, now)
    return reply, store.unbacked(reply, now)
