"""Memory lent to other workers: their blocks, kept under leases, and attention over them (Infinite-LLM)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from anyio import CapacityLimiter, to_thread

from covey.clock import Clock
from covey.errors import InvalidArgument, LeaseExpired, NoSpace
from covey.model.plan import Floats, Runner, ShardRunner
from covey.policy.blocks import BlockPool
from covey.types.ids import LeaseId, TenantId
from covey.types.lend import AttendPart, AttendReply, AttendRequest, AttendRow, LendChunk, LendReply, ReturnRequest

from .limits import EngineLimits

LEASE_BYTES = 16


@dataclass(slots=True, kw_only=True)
class _Loan:
    tenant: TenantId
    owner: str
    blocks: tuple[int, ...]
    expires_at: float
    is_whole: bool = False
    """Whether all bytes have come."""
    readers: int = 0
    """Attentions over it that are being computed: the blocks stay until they are through."""
    is_over: bool = False


@dataclass(slots=True, kw_only=True)
class _Filling:
    """How far an upload has come: blocks are filled in order, each from its beginning."""

    index: int = 0
    offset: int = 0
    views: list[memoryview] = field(default_factory=list)


class Creditor:
    """Keeps blocks of others' sequences. A lease lives by being used: who stops asking gets nothing back.

    No more than `lend_share` of the pool is lent; a lease of another tenant is as one that never was.
    """

    def __init__(self, pool: BlockPool, runner: Runner, limits: EngineLimits, clock: Clock) -> None:
        self._pool = pool
        self._runner = runner
        self._limits = limits
        self._clock = clock
        self._loans: dict[LeaseId, _Loan] = {}
        self._limiter = CapacityLimiter(1)
        self.attended = 0
        """Rows attended to for others, so far."""

    @property
    def lent(self) -> int:
        """Blocks that are lent now."""
        return sum(len(loan.blocks) for loan in self._loans.values())

    @property
    def lendable(self) -> int:
        """Blocks that could be lent now."""
        if not isinstance(self._runner, ShardRunner):
            return 0
        share = int(self._limits.lend_share * self._pool.capacity) - self.lent
        return max(0, min(share, self._pool.available))

    async def lend(self, chunks: AsyncIterable[LendChunk]) -> LendReply:
        """Take blocks in. Raises NoSpace, and InvalidArgument when the pieces do not make whole blocks."""
        lease, loan = LeaseId(""), None
        filling = _Filling()
        try:
            async for chunk in chunks:
                if loan is None:
                    lease, loan = self._open(chunk)
                    filling.views = [self._runner.block_view(block) for block in loan.blocks]
                _fill(filling, chunk, loan.tenant)
            if loan is None or filling.index != len(loan.blocks):
                raise InvalidArgument("the blocks are not whole", field="blocks")
            loan.is_whole, loan.expires_at = True, self._clock.now() + self._limits.loan_ttl_s
        except BaseException:
            self._end(lease)
            raise
        finally:
            for view in filling.views:
                view.release()
        return LendReply(lease=lease, ttl_s=self._limits.loan_ttl_s)

    async def attend(self, request: AttendRequest) -> AttendReply:
        """Attend to lent blocks for their owners, which renews the leases. Raises LeaseExpired, InvalidArgument."""
        loans = [self._find(row.tenant, row.lease) for row in request.rows]
        queries = [self._queries(row) for row in request.rows]
        for loan in loans:
            loan.expires_at = self._clock.now() + self._limits.loan_ttl_s
            loan.readers += 1
        try:
            parts = await to_thread.run_sync(self._compute, request.layer, loans, queries, limiter=self._limiter)
        finally:
            for loan in loans:
                loan.readers -= 1
                if loan.is_over:
                    self._free(loan)
        self.attended += sum(row.tokens > 0 for row in request.rows)
        return AttendReply(parts=tuple(parts))

    def take_back(self, request: ReturnRequest) -> None:
        """End a loan whose owner needs it no more; without effect when it has ended."""
        loan = self._loans.get(request.lease)
        if loan is not None and loan.tenant == request.tenant:
            self._end(request.lease)

    def sweep(self, now: float) -> None:
        """End the loans that nobody has used for too long: their owners are gone."""
        for lease, loan in tuple(self._loans.items()):
            if loan.expires_at <= now:
                self._end(lease)

    def _open(self, first: LendChunk) -> tuple[LeaseId, _Loan]:
        if first.blocks > self.lendable:
            raise NoSpace(f"{first.blocks} blocks were asked for, {self.lendable} can be lent", field="blocks")
        self._pool.reserve(first.blocks)
        blocks = self._pool.take(first.blocks, room=first.blocks)
        expires_at = self._clock.now() + self._limits.kv_timeout_s
        loan = _Loan(tenant=first.tenant, owner=first.owner, blocks=blocks, expires_at=expires_at)
        lease = LeaseId(secrets.token_hex(LEASE_BYTES))
        self._loans[lease] = loan
        return lease, loan

    def _find(self, tenant: TenantId, lease: LeaseId) -> _Loan:
        loan = self._loans.get(lease)
        if loan is None or loan.tenant != tenant or not loan.is_whole or loan.expires_at <= self._clock.now():
            raise LeaseExpired("these blocks are not lent any more", field="rows.lease")
        return loan

    def _queries(self, row: AttendRow) -> Floats:
        assert isinstance(self._runner, ShardRunner), "only such a runner lends"
        shape = (row.tokens, *self._runner.query_shape)
        if len(row.q) != 4 * int(np.prod(shape)):
            raise InvalidArgument(f"{shape} fp32 numbers are needed", field="rows.q")
        return np.frombuffer(row.q, np.float32).reshape(shape).copy()

    def _compute(self, layer: int, loans: Sequence[_Loan], queries: Sequence[Floats]) -> list[AttendPart]:
        assert isinstance(self._runner, ShardRunner), "only such a runner lends"
        found = []
        for loan, q in zip(loans, queries, strict=True):
            if not len(q):
                found.append(AttendPart(out=b"", lse=b""))
                continue
            out, lse = self._runner.attend(layer, loan.blocks, q)
            found.append(AttendPart(out=out.tobytes(), lse=lse.tobytes()))
        return found

    def _end(self, lease: LeaseId) -> None:
        loan = self._loans.pop(lease, None)
        if loan is not None:
            loan.is_over = True
            self._free(loan)

    def _free(self, loan: _Loan) -> None:
        if not loan.readers:
            self._pool.release(loan.blocks)
            loan.blocks = ()


def _fill(filling: _Filling, chunk: LendChunk, tenant: TenantId) -> None:
    """Put a piece where it belongs. Raises InvalidArgument for one that does not come next."""
    is_next = chunk.tenant == tenant and (chunk.index, chunk.offset) == (filling.index, filling.offset)
    if not is_next or filling.index >= len(filling.views) or not chunk.data:
        raise InvalidArgument("pieces come in order", field="index")
    view = filling.views[filling.index]
    end = chunk.offset + len(chunk.data)
    if end > view.nbytes:
        raise InvalidArgument(f"a block has {view.nbytes} bytes", field="data")
    view[chunk.offset : end] = chunk.data
    filling.offset = end
    if end == view.nbytes:
        filling.index, filling.offset = filling.index + 1, 0
