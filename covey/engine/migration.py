"""Requests that move: tickets, the leases that keep a ticket's blocks, blocks adopted ahead of a request."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import groupby

from covey.clock import Clock
from covey.errors import CoveyError, FailedPrecondition, Overloaded
from covey.policy.blocks import BlockPool, Pin
from covey.policy.prefix_cache import CacheKey
from covey.types.generate import AdoptReply, HandoverTicket, TailBlock
from covey.types.ids import LeaseId, RequestId, WorkerId
from covey.types.kv import BlockKey
from covey.types.store import Held

from .chain import Stretch, named_by, parents
from .limits import EngineLimits
from .messages import Adopt, Export
from .sequence import Sequence
from .transfer import Spawn, Tail, Transfers

TICKETS_MAX = 1024
"""Hand-overs whose leases are kept at once; past it the oldest go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """What there is of a sequence at one moment; its full blocks do not change any more, the last one is a copy."""

    seq: Sequence
    stretches: tuple[Stretch, ...]
    blocks: tuple[int, ...]
    tail: Tail | None
    data: memoryview | None
    ticket: HandoverTicket


class Migration:
    """Stores the blocks of running requests under a ticket and keeps their leases until the other side has its own."""

    def __init__(
        self, pool: BlockPool, transfers: Transfers | None, limits: EngineLimits, *, worker: WorkerId, clock: Clock
    ) -> None:
        self._pool = pool
        self._transfers = transfers
        self._limits = limits
        self._worker = worker
        self._clock = clock
        self._leases: dict[RequestId, tuple[float, list[Held]]] = {}
        self._adopted: set[LeaseId] = set()

    @property
    def has_store(self) -> bool:
        """Whether there is anywhere to move blocks to."""
        return self._transfers is not None

    async def stash(self, seq: Sequence, block_size: int) -> HandoverTicket:
        """Store what is computed of a sequence that no step runs, and describe it. Its blocks must stay held meanwhile.

        Raises what the store raises; then no lease is left. Raises FailedPrecondition without a store.
        """
        return await self._store(self._snapshot(seq, block_size))

    def _snapshot(self, seq: Sequence, block_size: int) -> _Snapshot:
        transfers = self._required()
        covered, full = seq.computed, seq.computed // block_size
        tail = tail_of(seq, covered, block_size)
        ticket = replace(
            self.bare_ticket(seq),
            hashes=tuple(key[1] for key in seq.chain.keys[:full]),
            tail=None if tail is None else TailBlock(key=tail.key.hash, length=covered - full * block_size),
            covered=covered,
        )
        return _Snapshot(
            seq=seq,
            stretches=tuple(seq.chain.stretches(0, full)),
            blocks=tuple(seq.blocks[:full]),
            tail=tail,
            data=transfers.copy(seq.blocks[full]) if tail is not None else None,
            ticket=ticket,
        )

    async def _store(self, taken: _Snapshot) -> HandoverTicket:
        transfers, seq, tail = self._required(), taken.seq, taken.tail
        owner, ttl_s = f"{self._worker}/{seq.id}", self._limits.handover_ttl_s
        leases = await transfers.put(seq.request.tenant, taken.stretches, taken.blocks, owner=owner, ttl_s=ttl_s)
        if tail is not None and taken.data is not None:
            try:
                leases.append(await transfers.put_tail(tail, taken.data, owner=owner, ttl_s=ttl_s))
            except BaseException:
                await transfers.release(leases)
                raise
        seq.blocks_moved += max(0, len(taken.blocks) - seq.stored) + (tail is not None)
        seq.stored = len(taken.blocks)
        await self._keep(seq.request.request_id, leases)
        return taken.ticket

    def bare_ticket(self, seq: Sequence) -> HandoverTicket:
        """A ticket without blocks: whoever continues computes them again."""
        return HandoverTicket(
            request_id=seq.request.request_id,
            attempt=seq.request.attempt,
            source=self._worker,
            scopes=seq.request.scopes,
            hashes=(),
            emitted=tuple(seq.tokens[seq.prompt_len :]),
            covered=0,
            text_offset=seq.text.offset,
        )

    def sweep(self, now: float, spawn: Spawn) -> None:
        """Give back the leases of tickets, and unpin the adopted blocks, that nobody came for in time."""
        for pin in self._pool.due_pins(now):
            if pin.id in self._adopted:
                self._adopted.discard(pin.id)
                self._pool.unpin(pin.id)
        for request_id, (expires_at, _leases) in tuple(self._leases.items()):
            if expires_at <= now:
                self.forget(request_id, spawn)

    def forget(self, request_id: RequestId, spawn: Spawn) -> None:
        """Give back a ticket's leases; without effect when there are none."""
        _, leases = self._leases.pop(request_id, (0.0, []))
        if leases:
            spawn(self._required().release, leases)

    def export(self, ask: Export, seq: Sequence, block_size: int, spawn: Spawn) -> None:
        """Answer with a ticket for a request that runs on; between two steps, because the last block is copied."""
        try:
            taken = self._snapshot(seq, block_size)
        except CoveyError as error:
            ask.reply.fail(error)
            return
        pin = self._pool.pin(taken.blocks, expires_at=float("inf"))
        spawn(self._export, ask, taken, pin)

    async def _export(self, ask: Export, taken: _Snapshot, pin: Pin) -> None:
        try:
            ask.reply.set(await self._store(taken))
        except CoveyError as error:
            ask.reply.fail(error)
        finally:
            self._pool.unpin(pin.id)

    async def adopt(self, ask: Adopt) -> None:
        """Load a ticket's full blocks into the prefix cache and pin them until the request comes."""
        try:
            ask.reply.set(AdoptReply(blocks=await self._adopt(ask.request.ticket, ask)))
        except CoveyError as error:
            ask.reply.fail(error)

    async def _adopt(self, ticket: HandoverTicket, ask: Adopt) -> int:
        transfers, ttl_s = self._required(), self._limits.handover_ttl_s
        names = named_by(ticket)
        held = list(self._pool.match(names))
        try:
            missing = len(names) - len(held)
            if missing > self._pool.available:
                raise Overloaded("no room for the ticket's blocks", retry_after_ms=1000)
            self._pool.reserve(missing)
            first = len(held)
            held += self._pool.take(missing, after=held[-1] if held else None, room=missing)
            tenant, owner = ask.request.tenant, f"{self._worker}/adopt"
            fetched = await transfers.fetch(tenant, _stretches(names), held[first:], skip=first, owner=owner)
            good = first + fetched.blocks
            for index, parent in list(enumerate(parents(names)))[first:good]:
                held[index] = self._pool.name(held[index], names[index], parent)
            if good and self._pool.pinned + good <= self._limits.pinned_share * self._pool.capacity:
                self._adopted.add(self._pool.pin(held[:good], expires_at=self._clock.now() + ttl_s).id)
        finally:
            self._pool.release(held)
        return good

    async def _keep(self, request_id: RequestId, leases: list[Held]) -> None:
        transfers = self._required()
        _, former = self._leases.pop(request_id, (0.0, []))
        if len(self._leases) >= TICKETS_MAX:
            oldest = next(iter(self._leases))
            former += self._leases.pop(oldest)[1]
        self._leases[request_id] = (self._clock.now() + self._limits.handover_ttl_s, leases)
        await transfers.release(former)

    def _required(self) -> Transfers:
        if self._transfers is None:
            raise FailedPrecondition("this worker has no store to hand blocks over with")
        return self._transfers


def tail_of(seq: Sequence, covered: int, block_size: int) -> Tail | None:
    """The unfinished block after `covered` tokens; None when the last block is full."""
    start = covered // block_size * block_size
    if start == covered:
        return None
    namespace, key = seq.chain.tail(seq.tokens[start:covered], seq.request.request_id, start // block_size)
    return Tail(tenant=seq.request.tenant, namespace=namespace, key=key)


def _stretches(names: Items[CacheKey]) -> list[Stretch]:
    """A ticket's chain, to look up: what a block grows from matters only when it is stored."""
    numbered = groupby(enumerate(names), key=lambda item: item[1][0])
    chains = [(namespace, list(group)) for namespace, group in numbered]
    return [
        Stretch(namespace=namespace, first=items[0][0], keys=tuple(BlockKey(hash=name[1]) for _, name in items))
        for namespace, items in chains
    ]
