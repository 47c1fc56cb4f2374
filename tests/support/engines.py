"""Engines over fake runners, and a store of blocks that tests can break."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from covey.clock import Clock, MonotonicClock
from covey.engine.engine import Engine, open_engine
from covey.engine.fake import FakeRunner, FakeVocabulary
from covey.engine.limits import EngineLimits
from covey.engine.text import Vocabulary
from covey.errors import Unavailable
from covey.model.plan import Runner
from covey.net.memory_kv import MemoryBlockStore
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.generate import (
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Handover,
    KvScope,
    Role,
    Sampling,
    Tokens,
)
from covey.types.ids import BlockHash, NamespaceId, RequestId, TenantId, WorkerId
from covey.types.kv import BlockKey, LookupReply, LookupRequest, QuarantineRequest
from covey.types.kv_state import StoreStats
from covey.types.store import Held, Ready, StoreKey

TENANT = TenantId("t")
SCOPE = KvScope(namespace=NamespaceId(b"n" * 16), chain_root=b"root")


def request_of(
    tokens: Sequence[int], *, request_id: str = "r1", max_tokens: int = 12, deadline_s: float = 30.0, **fields: Any
) -> GenerateRequest:
    """A request; sampling fields and request fields may be given together."""
    names = {name: fields.pop(name) for name in tuple(fields) if name in Sampling.__dataclass_fields__}
    sampling = Sampling(max_tokens=max_tokens, **({"ignore_eos": True} | names))
    return GenerateRequest(
        request_id=RequestId(request_id),
        tenant=TENANT,
        model="fake",
        scopes=(SCOPE,),
        token_ids=tuple(tokens),
        sampling=sampling,
        deadline_s=deadline_s,
        **fields,
    )


@dataclass
class Answer:
    """All events of a stream, and what they say."""

    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[Tokens]:
        found = [event for event in self.events if isinstance(event, Tokens)]
        if self.events and isinstance(self.events[-1], Handover):
            found.append(self.events[-1].first)
        return found

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for event in self.tokens for token in event.ids)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.tokens)

    @property
    def last(self) -> Any:
        return self.events[-1]


async def collect(
    engine: Engine,
    request: GenerateRequest,
    on_event: Callable[[Event], None] | None = None,
    *,
    timeout_s: float = 60.0,
) -> Answer:
    """Read a stream to its end."""
    answer = Answer()
    with anyio.fail_after(timeout_s):
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                answer.events.append(event)
                if on_event is not None:
                    on_event(event)
    return answer


class Shelf:
    """The in-memory store, with faults: `is_down` makes every call fail, `slow_s` makes it wait first, `forgets` makes
    every look-up a miss.
    """

    def __init__(self, capacity_bytes: int = 64 << 20) -> None:
        self._clock = MonotonicClock()
        self._store = MemoryBlockStore(clock=self._clock, capacity_bytes=capacity_bytes)
        self.is_down = False
        self.slow_s = 0.0
        self.forgets = False

    @property
    def stats(self) -> StoreStats:
        return self._store.index.stats()

    def corrupt(self, name: BlockHash, shape: BlockShape) -> None:
        """Flip a bit of a stored block."""
        held = self._find(name, shape)
        (block,) = held.blocks
        self._store.corrupt(block.offset)
        assert held.lease is not None
        self._store.release(held.lease)

    async def touch(self) -> None:
        """Let the store notice which leases have ended: it looks at each call."""
        self._find(BlockHash(b"nothing".ljust(16)), BlockShape(size_bytes=128, layers=2))

    def remove(self, name: BlockHash) -> None:
        """Make a stored block a miss."""
        request = QuarantineRequest(tenant=TENANT, namespace=SCOPE.namespace, hash=name, reason="test")
        self._store.index.quarantine(request, self._clock.now())

    def _find(self, name: BlockHash, shape: BlockShape) -> LookupReply:
        request = LookupRequest(
            tenant=TENANT, namespace=SCOPE.namespace, hashes=(name,), owner="test", ttl_s=1.0, shape=shape
        )
        return self._store.index.lookup(request, self._clock.now())

    async def lookup(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        await self._pass()
        return await self._store.lookup(key, () if self.forgets else hashes, owner=owner, ttl_s=ttl_s)

    async def load(self, held: Held, into: Sequence[memoryview], *, ready: Ready | None = None) -> int:
        await self._pass()
        return await self._store.load(held, into, ready=ready)

    async def store(
        self,
        key: StoreKey,
        blocks: Sequence[BlockKey],
        data: Sequence[memoryview],
        *,
        owner: str,
        ttl_s: float,
        private: bool = False,
    ) -> Held:
        await self._pass()
        return await self._store.store(key, blocks, data, owner=owner, ttl_s=ttl_s, private=private)

    async def pin(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        return await self._store.pin(key, hashes, owner=owner, ttl_s=ttl_s)

    async def _pass(self) -> None:
        await anyio.sleep(self.slow_s)
        if self.is_down:
            raise Unavailable("the store is down")


@asynccontextmanager
async def running_engine(
    runner: Runner | None = None,
    *,
    role: Role = Role.DECODE,
    limits: EngineLimits | None = None,
    store: Any = None,
    clock: Clock | None = None,
    vocabulary: Vocabulary | None = None,
    name: str = "w1",
    **options: Any,
) -> AsyncIterator[Engine]:
    """An engine; on leaving, its actor's `check()`s must hold."""
    runner = runner or FakeRunner()
    async with open_engine(
        runner,
        vocabulary or FakeVocabulary(),
        role=role,
        worker=WorkerId(name),
        clock=clock or MonotonicClock(),
        limits=limits or EngineLimits(),
        store=store,
        **options,
    ) as engine:
        yield engine


def plain(request: GenerateRequest, **changes: Any) -> GenerateRequest:
    """The request with other fields."""
    return replace(request, **changes)


def is_whole(answer: Answer, *, start: int = 0) -> bool:
    """Whether offsets of tokens and characters are contiguous and there is exactly one terminal event, the last."""
    offset, text_offset = start, None
    for event in answer.tokens:
        if event.offset != offset or (text_offset is not None and event.text_offset != text_offset):
            return False
        offset += len(event.ids)
        text_offset = event.text_offset + len(event.text)
    terminal = [event for event in answer.events if isinstance(event, Finished | Handover) or hasattr(event, "code")]
    return terminal == [answer.events[-1]]


def is_cancelled(answer: Answer) -> bool:
    return isinstance(answer.last, Finished) and answer.last.reason is FinishReason.CANCELLED


async def assert_idle(engine: Engine, *, pinned: int | None = 0) -> None:
    """Nothing runs, waits or is held beyond pins, within a deadline; `pinned` None: any number."""

    def is_idle() -> bool:
        load = engine.load()
        assert load.running == load.waiting == 0, load
        assert pinned is None or load.pinned_blocks == pinned, load
        return load.free_blocks + load.cached_blocks + load.pinned_blocks == load.total_blocks

    await assert_eventually(is_idle, timeout_s=5)
    engine.check()
