"""The remote tier: blocks in an engine that a fleet shares, behind a deadline and a breaker; its absence is a miss."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import anyio
from anyio import to_thread

from covey.clock import Clock
from covey.errors import DataCorrupt, Unavailable
from covey.policy.disk_record import Record, pack, unpack
from covey.retry import Breaker, BreakerState
from covey.types import block, kv_state
from covey.types.ids import BlockHash, NamespaceId

from .engine import Engine
from .tier import ALL_CODECS, TierCounts

PUT_BYTES_MAX = 2 << 20
"""Bytes sent in one call; one block may be larger."""
FIRST_ASKED = 16
ASKED_MAX = 1024
KNOWN_MAX = 65_536
"""Keys remembered as there, so that what went down is not sent again."""
KNOWN_BYTES = 200
"""Of a key and its entry in a dict."""

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteLimits:
    """`timeout_s` bounds a call that moves a block, `lookup_s` all the asking of one look-up."""

    timeout_s: float = 2.0
    lookup_s: float = 0.1
    calls_max: int = 8
    breaker_failures: int = 3
    breaker_open_s: float = 2.0


class RemoteTier:
    """One record a key, the same bytes as on a disk, verified on every read. No method raises for the engine's sake."""

    kind = kv_state.Tier.REMOTE

    def __init__(self, engine: Engine, *, limits: RemoteLimits, clock: Clock) -> None:
        self.counts = TierCounts()
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._breaker = Breaker(
            failures=limits.breaker_failures, open_s=limits.breaker_open_s, probe_s=2 * limits.timeout_s
        )
        self._calls = anyio.CapacityLimiter(limits.calls_max)
        self._known: dict[str, None] = {}
        self._why = ""

    # -- the contract ------------------------------------------------------------

    async def put(self, records: Sequence[Record], *, durable: bool) -> int:
        done = 0
        for batch in _batches(records):
            if not await self._put(batch):
                break
            done += len(batch)
        self.counts.refused += len(records) - done
        return done

    async def get(self, namespace: NamespaceId, name: BlockHash) -> Record | None:
        self.counts.gets += 1
        key = _key(namespace, name)
        data = await self._call(lambda: self._engine.get(key), self._limits.timeout_s)
        self._remember((key,), there=data is not None)
        if data is None:
            return None
        try:
            record = await to_thread.run_sync(unpack, data, namespace, name)
        except DataCorrupt as error:
            self.counts.quarantined += 1
            log.error("a block of the remote tier is bad: %s; it is gone", error.message)
            self._remember((key,), there=False)
            await self._call(lambda: self._engine.delete((key,)), self._limits.timeout_s)
            return None
        self.counts.hits += 1
        self.counts.got_bytes += len(record.payload)
        return record

    async def prefix(
        self, namespace: NamespaceId, hashes: Sequence[BlockHash], codecs: Sequence[block.BlockCodec] = ALL_CODECS
    ) -> int:
        """Ask in batches that double, for as long as the look-up may take; codecs show when a block is read."""
        count, size = 0, FIRST_ASKED
        until = self._clock.now() + self._limits.lookup_s
        while count < len(hashes) and (left_s := until - self._clock.now()) > 0:
            keys = [_key(namespace, name) for name in hashes[count : count + size]]
            there = await self._call(lambda keys=keys: self._engine.has(keys), left_s)  # type: ignore[misc]
            if there is None:
                break
            if not all(there):
                return count + there.index(False)
            count, size = count + len(keys), min(2 * size, ASKED_MAX)
        return count

    def knows(self, namespace: NamespaceId, name: BlockHash) -> bool:
        return _key(namespace, name) in self._known

    async def remove(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> int:
        """Forget the named blocks; what grows from them is not served, for no reader gets past the gap."""
        keys = [_key(namespace, name) for name in hashes]
        self._remember(keys, there=False)
        return await self._call(lambda: self._engine.delete(keys), self._limits.timeout_s) or 0

    async def scrub(self, step: Callable[[], None]) -> int:
        """Nothing: an engine answers for its own disks, and every read is verified."""
        return 0

    async def heal(self) -> None:
        """Probe an engine that was away, so that the first who needs it need not."""
        if self._breaker.state(self._clock.now()) is not BreakerState.CLOSED:
            await self._call(lambda: self._engine.has(("covey/probe",)), self._limits.timeout_s)

    def stats(self) -> kv_state.TierStats:
        is_up = self.is_up
        return kv_state.TierStats(tier=self.kind, writable=is_up, why="" if is_up else self._why)

    @property
    def index_bytes(self) -> int:
        return KNOWN_BYTES * len(self._known)

    @property
    def is_up(self) -> bool:
        """Whether the last calls were answered."""
        return self._breaker.state(self._clock.now()) is BreakerState.CLOSED

    # -- inside ------------------------------------------------------------------

    async def _put(self, batch: Sequence[Record]) -> bool:
        keys = [_key(record.namespace, record.hash) for record in batch]
        there = await self._call(lambda: self._engine.has(keys), self._limits.timeout_s)
        if there is None:
            return False
        missing = {key: record for key, record, known in zip(keys, batch, there, strict=True) if not known}
        items = {key: await to_thread.run_sync(pack, record) for key, record in missing.items()}
        done = await self._call(lambda: _then_true(self._engine.put(items)), self._limits.timeout_s)
        if done:
            self._remember(keys, there=True)
            self.counts.puts += len(missing)
            self.counts.put_bytes += sum(len(record.payload) for record in missing.values())
        return bool(done)

    def _remember(self, keys: Sequence[str], *, there: bool) -> None:
        for key in keys:
            self._known.pop(key, None)
            if there:
                self._known[key] = None
        while len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]

    async def _call(self, call: Callable[[], Awaitable[T]], timeout_s: float) -> T | None:
        """Return what the engine answers; None when it is away, late or failing."""
        attempt = self._breaker.attempt(self._clock.now())
        if attempt is None:
            return None
        try:
            with anyio.move_on_after(timeout_s):
                async with self._calls:
                    answer = await call()
                self._breaker.succeed(attempt)
                return answer
            why = "it is late"
        except Unavailable as error:
            why = error.message
        except BaseException:
            self._breaker.cancel(attempt)
            raise
        self.counts.failed += 1
        self._why = why
        was_up = self.is_up
        self._breaker.fail(attempt, self._clock.now())
        if was_up and not self.is_up:
            log.warning("the remote tier is left alone for a while: %s", why)
        return None


async def _then_true(done: Awaitable[None]) -> bool:
    await done
    return True


def _key(namespace: NamespaceId, name: BlockHash) -> str:
    return f"{namespace.hex()}/{name.hex()}"


def _batches(records: Sequence[Record]) -> list[list[Record]]:
    batches: list[list[Record]] = []
    size_bytes = PUT_BYTES_MAX
    for record in records:
        size_bytes += len(record.payload)
        if size_bytes > PUT_BYTES_MAX:
            batches.append([])
            size_bytes = len(record.payload)
        batches[-1].append(record)
    return batches
