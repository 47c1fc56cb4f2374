"""RECODE: blocks are encoded anew while readers hold the old version; at no moment is there neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import anyio
import numpy as np
from anyio import CapacityLimiter, to_thread

from covey import failpoint
from covey.actor import Ref
from covey.compression import Codec, Codecs, decode, encode, encoded
from covey.compression.codec import raw
from covey.compression.pages import read_pages
from covey.errors import CoveyError, DataCorrupt, InvalidArgument, LayoutMismatch
from covey.net.kv.copying import checksums
from covey.policy.codecs import can_recode, settled
from covey.policy.store_index import Placed
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import LeaseGrant, LeaseRequest, LookupRequest, QuarantineRequest
from covey.types.kv_state import StartTask, TaskKind, Tier

from .codecs import CodecSettings
from .store import Command, Store
from .tasks import Progress

R = TypeVar("R")

OWNER = "store/recode"
STORE = TenantId("")
"""Whose the leases on new versions are: the store's own."""
LEASE_TTL_S = 30.0
ASK_TIMEOUT_S = 5.0
LIST_MAX = 4096
"""Blocks looked at in one turn of the store's actor."""


class Outcome(StrEnum):
    """What became of a block."""

    RECODED = "recoded"
    KEPT = "not smaller or of unknown numbers"
    OVER = "over the error budget"
    GONE = "gone meanwhile"
    BAD = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """A payload as it may be stored, with the checksums of its layers and how far its numbers are off."""

    payload: bytes
    sums: tuple[int, ...]
    error: float


class Recoder:
    """Encodes stored blocks anew, one at a time, in a thread of its own.

    The setting `error_max` is the budget of quality: the root mean square of what a block's numbers are off by,
    relative to that of the numbers; a block that exceeds it stays as it is.
    """

    def __init__(self, store: Store, actor: Ref[Command[object]], codecs: Codecs, settings: CodecSettings) -> None:
        self._store = store
        self._actor = actor
        self._codecs = codecs
        self._settings = settings
        self._policy = settings.policy()
        self._thread = CapacityLimiter(1)

    async def recode(self, request: StartTask, progress: Progress) -> str:
        """Handle a task: `hashes` of `namespace`, or all blocks there, or everywhere; a tenant's only if it is named.

        Into `codec`; without one (RAW) as the policy of the memory tier says. The last blocks of each chain stay
        exact. Raises `LayoutMismatch` for a codec that is not here, `InvalidArgument` for one that holds no numbers.
        """
        if request.codec is BlockCodec.XQUANT:
            raise InvalidArgument("XQUANT keeps layer inputs, which a store has not", field="codec")
        if request.codec is not BlockCodec.RAW:
            self._codecs.find(request.codec)
        wanted = await self._wanted(request)
        progress.expect(len(wanted))
        outcomes: Counter[Outcome] = Counter()
        for slot, codec in wanted:
            outcomes[await self._recode(slot, codec)] += 1
            progress.step()
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "nothing to recode"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Recode as the memory tier's policy says, now and then, while the arena is fuller than `memory_above`."""
        async with anyio.create_task_group() as tg:
            if self._policy.tiers[Tier.MEMORY] is not BlockCodec.RAW:
                tg.start_soon(self._keep, name="recode")
            yield
            tg.cancel_scope.cancel()

    async def _keep(self) -> None:
        while True:
            await anyio.sleep(self._settings.memory_every_s)
            stats = self._store.index.stats()
            if stats.used_bytes > self._settings.memory_above * stats.capacity_bytes:
                with suppress(CoveyError):  # a store that is busy or full now is tried again
                    await self.recode(StartTask(kind=TaskKind.RECODE), Progress())

    # -- which blocks ------------------------------------------------------------

    async def _wanted(self, request: StartTask) -> list[tuple[Placed, Codec]]:
        placed = await self._placed(request)
        keep = settled(((slot.location.hash, slot.parent) for slot in placed), self._policy.recent_blocks)
        found = []
        for slot in placed:
            if slot.location.hash not in keep or (request.tenant and slot.tenant != request.tenant):
                continue
            name = request.codec
            if name is BlockCodec.RAW:
                name = self._policy.choose(Tier.MEMORY, slot.tenant, slot.shape.element, self._codecs.names)
            if can_recode(slot.codec, name, slot.shape.element):
                found.append((slot, self._codecs.find(name)))
        return found

    async def _placed(self, request: StartTask) -> list[Placed]:
        if request.hashes:
            spaces = [(request.namespace, request.hashes)]
        else:
            every = await self._ask(lambda store, _: tuple(store.index.snapshot()))
            spaces = [(name, hashes) for name, hashes in every if request.namespace in (name, NamespaceId(b""))]
        found: list[Placed] = []
        for namespace, hashes in spaces:
            for start in range(0, len(hashes), LIST_MAX):
                found += await self._visible(namespace, hashes[start : start + LIST_MAX])
        return found

    async def _visible(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> tuple[Placed, ...]:
        return await self._ask(lambda store, _: store.index.visible(namespace, hashes))

    # -- one block ---------------------------------------------------------------

    async def _recode(self, slot: Placed, codec: Codec) -> Outcome:
        async with self._reading(slot) as held:
            if held is None or held.codec is not slot.codec:
                return Outcome.GONE
            try:
                version = await to_thread.run_sync(self._encoded, held, codec, limiter=self._thread)
            except DataCorrupt as error:
                await self._quarantine(held, error.message)
                return Outcome.BAD
            except (InvalidArgument, LayoutMismatch):
                return Outcome.KEPT
            if version.error > self._settings.error_max:
                return Outcome.OVER
            return Outcome.RECODED if await self._put(held, codec, version) else Outcome.GONE

    def _encoded(self, slot: Placed, codec: Codec) -> _Version:
        """Runs in a thread, under a lease. Raises `DataCorrupt`, and what encoding does."""
        payload = bytes(self._store.payload(slot))
        if checksums(memoryview(payload), slot.shape) != self._store.header(slot).checksums:
            raise DataCorrupt("a layer does not have its checksum")
        shape = raw(slot.shape)
        if slot.codec is not BlockCodec.RAW:
            buffer = bytearray(shape.size_bytes)
            decode(self._codecs.find(slot.codec), payload, shape, memoryview(buffer))
            payload = bytes(buffer)
        data = encode(codec, payload, shape)
        back = bytearray(shape.size_bytes)
        decode(codec, data, shape, memoryview(back))
        return _Version(
            payload=data,
            sums=checksums(memoryview(data), encoded(codec, shape)),
            error=_relative_error(payload, bytes(back), slot),
        )

    async def _put(self, slot: Placed, codec: Codec, version: _Version) -> bool:
        name = slot.location.hash
        grant, (draft,) = await self._ask(
            lambda store, now: store.index.draft(
                slot.namespace, {name: len(version.payload)}, codec.name, owner=OWNER, ttl_s=LEASE_TTL_S, now=now
            )
        )
        try:
            await to_thread.run_sync(self._store.back, draft, limiter=self._thread)
            await failpoint.hit_async("kvstore.recode")
            return await self._ask(
                lambda store, now: store.replace(grant.lease, name, version.payload, version.sums, now)
            )
        finally:
            await self._release(grant, STORE)

    @asynccontextmanager
    async def _reading(self, slot: Placed) -> AsyncIterator[Placed | None]:
        """Lease a block as it is now; None when it is not visible any more."""
        request = LookupRequest(
            tenant=slot.tenant, namespace=slot.namespace, hashes=(slot.location.hash,), owner=OWNER,
            ttl_s=LEASE_TTL_S, shape=slot.shape if slot.codec is BlockCodec.RAW else raw(slot.shape),
            codecs=tuple(BlockCodec),
        )  # fmt: skip

        def enter(store: Store, now: float) -> tuple[LeaseGrant, Placed] | None:
            grant = store.index.lookup(request, now).lease
            return None if grant is None else (grant, store.index.locate(grant.lease, request.hashes, now)[0])

        found = await self._ask(enter)
        if found is None:
            yield None
            return
        try:
            yield found[1]
        finally:
            await self._release(found[0], slot.tenant)

    async def _release(self, grant: LeaseGrant, tenant: TenantId) -> None:
        """End a lease of ours, also when the task is cancelled; one that has ended is as good."""
        request = LeaseRequest(tenant=tenant, lease=grant.lease, epoch=grant.epoch)
        with anyio.CancelScope(shield=True), suppress(CoveyError):
            await self._ask(lambda store, now: store.index.release(request, now))

    async def _quarantine(self, slot: Placed, reason: str) -> None:
        request = QuarantineRequest(
            tenant=slot.tenant, namespace=slot.namespace, hash=slot.location.hash, reason=reason
        )
        await self._ask(lambda store, now: store.index.quarantine(request, now))

    async def _ask(self, act: Callable[[Store, float], R]) -> R:
        return await self._actor.ask(Command(act=act), timeout_s=ASK_TIMEOUT_S)


def _relative_error(before: bytes, after: bytes, slot: Placed) -> float:
    shape = raw(slot.shape)
    old, new = read_pages(before, shape), read_pages(after, shape)
    size = float(np.square(old.keys).sum() + np.square(old.values).sum())
    off = float(np.square(old.keys - new.keys).sum() + np.square(old.values - new.values).sum())
    return (off / size) ** 0.5 if size else 0.0
