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
from covey.testing import assert_eventually
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
from covey.types.kv import BlockKey
from covey.types.store import StoreKey

SCOPE = KvScope(namespace=NamespaceId(b"n" * 16), chain_root=b"root")


def request_of(
    tokens: Sequence[int], *, request_id: str = "r1", max_tokens: int = 12, deadline_s: float = 30.0, **fields: Any
) -> GenerateRequest:
    """A request; sampling fields and request fields may be given together."""
    names = {name: fields.pop(name) for name in tuple(fields) if name in Sampling.__dataclass_fields__}
    sampling = Sampling(max_tokens=max_tokens, **({"ignore_eos": True} | names))
    return GenerateRequest(
        request_id=RequestId(request_id),
        tenant=TenantId("t"),
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


async def collect(engine: Engine, request: GenerateRequest, on_event: Callable[[Event], None] | None = None) -> Answer:
    """Read a stream to its end."""
    answer = Answer()
    with anyio.fail_after(60):
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                answer.events.append(event)
                if on_event is not None:
                    on_event(event)
    return answer


class ShelfLease:
    """A lease of `Shelf`."""

    def __init__(self, shelf: Shelf, key: StoreKey, hashes: tuple[BlockHash, ...]) -> None:
        self.shelf, self.key, self.hashes = shelf, key, hashes
        self.is_released = False
        shelf.leases.add(self)

    async def release(self) -> None:
        self.is_released = True
        self.shelf.leases.discard(self)
        held = {(lease.key, name) for lease in self.shelf.leases for name in lease.hashes}
        for name in self.hashes:
            if (self.key, name) in self.shelf.private and (self.key, name) not in held:
                self.shelf.private.discard((self.key, name))
                self.shelf.blocks.pop((self.key, name), None)


class Shelf:
    """A `BlockStore` in a dict: `bad` blocks fail their checksum, `is_down` makes every call fail, `slow_s` waits."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[StoreKey, BlockHash], bytes] = {}
        self.private: set[tuple[StoreKey, BlockHash]] = set()
        self.leases: set[ShelfLease] = set()
        self.bad: set[BlockHash] = set()
        self.is_down = False
        self.slow_s = 0.0
        self.loads = 0

    async def lookup(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> ShelfLease:
        await self._pass()
        found = []
        for name in hashes:
            if (key, name) not in self.blocks:
                break
            found.append(name)
        return ShelfLease(self, key, tuple(found))

    async def load(self, held: ShelfLease, into: Sequence[memoryview]) -> int:
        await self._pass()
        for index, (name, view) in enumerate(zip(held.hashes, into, strict=True)):
            if name in self.bad:
                view[:] = b"\xff" * len(view)
                return index
            view[:] = self.blocks[held.key, name]
            self.loads += 1
        return len(held.hashes)

    async def store(
        self,
        key: StoreKey,
        blocks: Sequence[BlockKey],
        data: Sequence[memoryview],
        *,
        owner: str,
        ttl_s: float,
        private: bool = False,
    ) -> ShelfLease:
        await self._pass()
        for name, view in zip(blocks, data, strict=True):
            self.blocks.setdefault((key, name.hash), bytes(view))
            if private:
                self.private.add((key, name.hash))
        return ShelfLease(self, key, tuple(name.hash for name in blocks))

    async def pin(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> ShelfLease:
        return ShelfLease(self, key, tuple(hashes))

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
