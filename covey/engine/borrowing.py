"""Sequences that are longer than this worker's pool: their oldest blocks live with other workers (Infinite-LLM)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio
import numpy as np
from anyio.from_thread import BlockingPortal

from covey.clock import Clock
from covey.codec.methods import Decode
from covey.errors import CoveyError, Overloaded, Unavailable
from covey.model.plan import Floats, Runner, ShardRunner
from covey.net.rpc import Channel
from covey.policy.blocks import BlockPool
from covey.policy.debtor import place_shards
from covey.types.ids import LeaseId, TenantId, WorkerId
from covey.types.lend import (
    ATTEND_BYTES_MAX,
    LEND_CHUNK_BYTES_MAX,
    AttendPart,
    AttendRequest,
    AttendRow,
    LendChunk,
    ReturnRequest,
)

from .limits import EngineLimits
from .loan import Borrowed
from .sequence import Sequence as Seq
from .transfer import Spawn

SUSPECT_S = 5.0
"""How long a worker that failed is not asked to lend: the registry may still list it."""
RETURN_TIMEOUT_S = 1.0
"""A loan that cannot be given back by then ends by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lender:
    """Another worker of the same model and layout."""

    worker: WorkerId
    address: str
    lendable: int
    """Blocks that it could lend, by its last report."""


class Neighbours(Protocol):
    """Who could lend, and how to speak to them."""

    def lenders(self) -> Sequence[Lender]:
        """The other workers whose blocks look like ours, as of now."""

    def to(self, address: str) -> Channel:
        """The channel to one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """`plan.Elsewhere`: all that a sequence has with creditors, at one moment."""

    tokens: int
    tenant: TenantId
    borrowed: tuple[Borrowed, ...]
    ask: Callable[[Shards, int, Floats], list[tuple[Floats, Floats]]] = field(repr=False)

    def attend(self, layer: int, q: Floats) -> list[tuple[Floats, Floats]]:
        """See `plan.Elsewhere.attend`."""
        return self.ask(self, layer, q)


class Borrowing:
    """Moves the oldest blocks of long sequences to creditors and asks those for attention, a call a loan and layer."""

    def __init__(
        self,
        pool: BlockPool,
        runner: Runner,
        limits: EngineLimits,
        clock: Clock,
        neighbours: Neighbours,
        *,
        worker: WorkerId,
    ) -> None:
        self._pool = pool
        self._runner = runner
        self._limits = limits
        self._clock = clock
        self._neighbours = neighbours
        self._worker = worker
        self._used_at: dict[LeaseId, float] = {}
        self._suspects: dict[WorkerId, float] = {}
        self.portal: BlockingPortal | None = None
        """How the step's thread reaches the event loop; set before anything runs."""

    @property
    def borrowed(self) -> int:
        """Loans that this worker has."""
        return len(self._used_at)

    async def move_out(self, seq: Seq) -> None:
        """Give all full blocks of a sequence but the last to creditors. No step may run the sequence meanwhile.

        Raises Overloaded when nobody can keep them.
        """
        size = self._runner.info.block_size
        base = seq.base
        count = max(1, (seq.computed - base) // size - 1)
        lenders = {each.worker: each for each in self._neighbours.lenders()}
        lendable = {name: each.lendable for name, each in lenders.items() if not self._is_suspect(name)}
        first = 0
        while first < count:
            places = place_shards(count - first, lendable)
            if not places:
                raise Overloaded(f"no worker can keep {count - first} blocks of a long context", retry_after_ms=1000)
            worker, blocks = places[0]
            try:
                await self._lend(seq, lenders[worker], seq.blocks[first : first + blocks])
            except CoveyError:  # it is gone, or has lent to somebody else meanwhile: ask the next one
                self._suspect(worker)
                del lendable[worker]
                continue
            first, lendable[worker] = first + blocks, lendable[worker] - blocks
        self._pool.release(seq.blocks[:count])
        self._pool.reserve(count)
        seq.blocks, seq.promised = seq.blocks[count:], seq.promised + count
        seq.elsewhere = Shards(
            tokens=base + count * size, tenant=seq.request.tenant, borrowed=tuple(seq.borrowed), ask=self._ask
        )

    def forget(self, seq: Seq, spawn: Spawn) -> None:
        """Give everything back; without effect when nothing is borrowed."""
        borrowed, seq.borrowed = list(seq.borrowed), []
        for loan in borrowed:
            self._used_at.pop(loan.lease, None)
            spawn(self._return, seq.request.tenant, loan)

    def sweep(self, now: float, live: Sequence[Seq], spawn: Spawn) -> None:
        """Renew the loans of sequences that stand still."""
        for seq in live:
            for loan in seq.borrowed:
                if now - self._used_at.get(loan.lease, now) > loan.ttl_s / 3:
                    self._used_at[loan.lease] = now
                    spawn(self._renew, seq.request.tenant, loan)

    def _suspect(self, worker: WorkerId) -> None:
        """Ask a worker for nothing, for a while."""
        now = self._clock.now()
        self._suspects = {name: until for name, until in self._suspects.items() if until > now}
        self._suspects[worker] = now + SUSPECT_S

    def _is_suspect(self, worker: WorkerId) -> bool:
        return self._suspects.get(worker, 0.0) > self._clock.now()

    async def _lend(self, seq: Seq, lender: Lender, blocks: Sequence[int]) -> None:
        channel, timeout_s = self._neighbours.to(lender.address), self._limits.kv_timeout_s
        reply = await channel.upload(Decode.LEND, self._chunks(seq, blocks), timeout_s=timeout_s)
        self._used_at[reply.lease] = self._clock.now()
        seq.borrowed.append(
            Borrowed(
                address=lender.address,
                worker=lender.worker,
                lease=reply.lease,
                ttl_s=reply.ttl_s,
                blocks=len(blocks),
            )
        )

    async def _chunks(self, seq: Seq, blocks: Sequence[int]) -> AsyncIterator[LendChunk]:
        tenant, owner = seq.request.tenant, f"{self._worker}/{seq.id}"
        for index, block in enumerate(blocks):
            with self._runner.block_view(block) as view:
                for at in range(0, view.nbytes, LEND_CHUNK_BYTES_MAX):
                    data = bytes(view[at : at + LEND_CHUNK_BYTES_MAX])
                    yield LendChunk(tenant=tenant, owner=owner, blocks=len(blocks), index=index, offset=at, data=data)

    def _ask(self, shards: Shards, layer: int, q: Floats) -> list[tuple[Floats, Floats]]:
        """From the step's thread."""
        assert self.portal is not None, "the engine has been opened"
        return self.portal.call(self._gather, shards, layer, q)

    async def _gather(self, shards: Shards, layer: int, q: Floats) -> list[tuple[Floats, Floats]]:
        found: dict[LeaseId, tuple[Floats, Floats]] = {}

        async def one(loan: Borrowed) -> None:
            try:
                found[loan.lease] = await self._attend(shards.tenant, loan, layer, q)
            except CoveyError:
                self._suspect(loan.worker)
                raise

        try:
            async with anyio.create_task_group() as tasks:
                for loan in shards.borrowed:
                    tasks.start_soon(one, loan)
        except* CoveyError as group:
            raise Unavailable("a worker that keeps a part of this context is gone") from group
        return [found[loan.lease] for loan in shards.borrowed]

    async def _attend(self, tenant: TenantId, loan: Borrowed, layer: int, q: Floats) -> tuple[Floats, Floats]:
        tokens, heads, width = q.shape
        most = max(1, ATTEND_BYTES_MAX // (4 * heads * width))
        outs, lses = [], []
        for at in range(0, tokens, most):
            piece = np.ascontiguousarray(q[at : at + most], dtype=np.float32)
            part = await self._call(tenant, loan, layer, piece)
            outs.append(np.frombuffer(part.out, np.float32).reshape(piece.shape))
            lses.append(np.frombuffer(part.lse, np.float32).reshape(piece.shape[:2]))
        return np.concatenate(outs), np.concatenate(lses)

    async def _call(self, tenant: TenantId, loan: Borrowed, layer: int, q: Floats) -> AttendPart:
        row = AttendRow(tenant=tenant, lease=loan.lease, tokens=len(q), q=q.tobytes())
        request = AttendRequest(layer=layer, rows=(row,))
        channel = self._neighbours.to(loan.address)
        reply = await channel.call(Decode.ATTEND, request, timeout_s=self._limits.kv_timeout_s)
        self._used_at[loan.lease] = self._clock.now()
        sizes = [(len(part.out), len(part.lse)) for part in reply.parts]
        if sizes != [(q.nbytes, q.nbytes // q.shape[2])]:
            raise Unavailable("the creditor did not answer what was asked")
        return reply.parts[0]

    async def _renew(self, tenant: TenantId, loan: Borrowed) -> None:
        row = AttendRow(tenant=tenant, lease=loan.lease, tokens=0)
        try:
            await self._neighbours.to(loan.address).call(
                Decode.ATTEND, AttendRequest(layer=0, rows=(row,)), timeout_s=RETURN_TIMEOUT_S
            )
        except CoveyError:
            return  # the next step of the sequence finds out

    async def _return(self, tenant: TenantId, loan: Borrowed) -> None:
        request = ReturnRequest(tenant=tenant, lease=loan.lease)
        try:
            await self._neighbours.to(loan.address).call(Decode.RETURN, request, timeout_s=RETURN_TIMEOUT_S)
        except CoveyError:
            return  # it ends by itself


def make_borrowing(
    pool: BlockPool,
    runner: Runner,
    limits: EngineLimits,
    clock: Clock,
    neighbours: Neighbours | None,
    *,
    worker: WorkerId,
) -> Borrowing | None:
    """None where nobody lends, nothing may be borrowed, or the runner takes no rows with keys elsewhere."""
    if neighbours is None or not limits.borrow_blocks or not isinstance(runner, ShardRunner):
        return None
    return Borrowing(pool, runner, limits, clock, neighbours, worker=worker)
