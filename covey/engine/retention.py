"""Blocks that outlive their request: a grace period, then pinned for a tool call, demoted to the store, or dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace

from covey.errors import CoveyError, LeaseExpired
from covey.policy.blocks import BlockPool, Pin
from covey.types.generate import Afterwards, RetainReply, RetainRequest
from covey.types.ids import LeaseId, TenantId

from .chain import Stretch
from .limits import EngineLimits
from .sequence import Sequence
from .transfer import Spawn, Transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    tenant: TenantId
    stretches: tuple[Stretch, ...]
    then: Afterwards
    is_retained: bool = False


class Retention:
    """The pins of finished requests and what becomes of them (design §6.3). No answer within the grace means demote."""

    def __init__(
        self, pool: BlockPool, transfers: Transfers | None, limits: EngineLimits, *, owner: str, block_bytes: int
    ) -> None:
        self._pool = pool
        self._transfers = transfers
        self._limits = limits
        self._owner = owner
        self._block_bytes = block_bytes
        self._kept: dict[LeaseId, _Kept] = {}
        self._writing = 0
        self.demoted = 0
        """Blocks written to the store after their request, so far."""
        self.lost = 0
        """Demotions that the store or the bound refused, so far."""

    def keep(self, seq: Sequence, *, now: float, grace_s: float) -> LeaseId | None:
        """Pin a finished sequence's named blocks; None when there are none, or too many are pinned already."""
        blocks = seq.blocks[: seq.named]
        if not blocks:
            return None
        is_new = seq.named > seq.stored  # what came from the store needs no writing back
        then = Afterwards.DEMOTE if is_new and self._transfers is not None else Afterwards.DROP
        fits = self._pool.pinned + len(blocks) <= self._limits.pinned_share * self._pool.capacity
        if not fits:
            grace_s = 0.0
        if grace_s <= 0 and then is Afterwards.DROP:
            return None
        pin = self._pool.pin(blocks, expires_at=now + grace_s)
        stretches = tuple(seq.chain.stretches(0, seq.named))
        self._kept[pin.id] = _Kept(tenant=seq.request.tenant, stretches=stretches, then=then)
        return pin.id if grace_s > 0 else None

    def retain(self, request: RetainRequest, *, now: float) -> RetainReply:
        """Keep the blocks for longer. Raises LeaseExpired when the grace is over or the lease never was."""
        kept, pin = self._kept.get(request.lease), self._pool.pin_of(request.lease)
        if kept is None or pin is None:
            raise LeaseExpired("the blocks' grace period is over", field="lease")
        ttl_s = min(request.ttl_s, self._limits.retain_max_s)
        self._pool.repin(pin.id, keep=len(pin.blocks), expires_at=now + ttl_s)
        then = request.then if self._transfers is not None else Afterwards.DROP
        self._kept[pin.id] = replace(kept, then=then, is_retained=True)
        blocks = len(pin.blocks)
        return RetainReply(blocks=blocks, size_bytes=blocks * self._block_bytes, ttl_s=ttl_s)

    def sweep(self, now: float, spawn: Spawn) -> None:
        """End the pins that are due; demotions run beside the steps, a bounded number at once."""
        for pin in self._pool.due_pins(now):
            kept = self._kept.pop(pin.id, None)
            if kept is None:
                continue  # not of a finished request, or already being written
            is_demoted = kept.then is Afterwards.DEMOTE and self._transfers is not None
            if is_demoted and self._writing < self._limits.writebacks_max:
                self._writing += 1
                spawn(self._demote, pin, kept)
            else:
                self.lost += is_demoted
                self._pool.unpin(pin.id)

    def give_way(self, now: float) -> None:
        """End a pin, one nobody retained if there is one: a request waits, and nothing runs that would make room."""
        pins = sorted(map(self._pin, self._kept), key=lambda pin: (self._kept[pin.id].is_retained, pin.expires_at))
        if pins and pins[0].expires_at > now and not self._writing:
            self._pool.repin(pins[0].id, keep=len(pins[0].blocks), expires_at=now)

    async def close(self) -> None:
        """Demote, one after the other, what is still pinned: the process ends."""
        for pin in self._pool.due_pins(float("inf")):
            kept = self._kept.pop(pin.id, None)
            if kept is not None and kept.then is Afterwards.DEMOTE and self._transfers is not None:
                self._writing += 1
                await self._demote(pin, kept)

    def _pin(self, pin_id: LeaseId) -> Pin:
        pin = self._pool.pin_of(pin_id)
        assert pin is not None, "what is kept is pinned"
        return pin

    async def _demote(self, pin: Pin, kept: _Kept) -> None:
        assert self._transfers is not None
        try:
            leases = await self._transfers.put(
                kept.tenant, kept.stretches, pin.blocks, owner=self._owner, ttl_s=2 * self._limits.kv_timeout_s
            )
            await self._transfers.release(leases)
            self.demoted += len(pin.blocks)
        except CoveyError:
            self.lost += 1
        finally:
            self._pool.unpin(pin.id)
            self._writing -= 1
