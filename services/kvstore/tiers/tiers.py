"""The tiers below memory as the service sees them: look-ups that go on below, durable commits, tasks, counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace

import anyio

from covey.errors import CoveyError, FailedPrecondition, InvalidArgument, Unavailable
from covey.policy.tiering import Chain, Tiering
from covey.types import block, kv, kv_state
from covey.types.ids import BlockHash, NamespaceId
from services.kvstore.tasks import Handler, Progress

from .below import Below, Cold
from .demotion import Demotion
from .memory import Memory
from .mover import Mover
from .promotion import Promotion

LookUp = Callable[[], Awaitable[kv.LookupReply]]


class Tiers:
    """What lies below memory, and what moves between."""

    def __init__(
        self, *, memory: Memory, below: Below, promotion: Promotion, demotion: Demotion, mover: Mover, policy: Tiering
    ) -> None:  # fmt: skip
        self.below = below
        self.promotion = promotion
        self._memory = memory
        self._demotion = demotion
        self._mover = mover
        self._policy = policy

    def handlers(self) -> dict[kv_state.TaskKind, Handler]:
        return {kv_state.TaskKind.PREFETCH: self.prefetch, kv_state.TaskKind.DEMOTE: self.demote}

    # -- reading -----------------------------------------------------------------

    def is_needed(self, request: kv.LookupRequest, reply: kv.LookupReply) -> bool:
        """Whether more of what was asked for could lie below."""
        return len(reply.blocks) < len(request.hashes) and bool(self.below.tiers)

    async def look_below(
        self, request: kv.LookupRequest, reply: kv.LookupReply, again: LookUp, *, within_s: float
    ) -> kv.LookupReply:
        """Say what further blocks lie below, and bring them up if the reader waits; `again` looks up anew.

        Takes at most `within_s`. The lease of `reply` is released when a better one takes its place.
        """
        try:
            return await self._look_below(request, reply, again, within_s)
        except BaseException:  # whoever asked has gone, and nobody else will release it
            if reply.lease is not None:
                await self._memory.release(request.tenant, reply.lease)
            raise

    async def _look_below(
        self, request: kv.LookupRequest, reply: kv.LookupReply, again: LookUp, within_s: float
    ) -> kv.LookupReply:
        missing = request.hashes[len(reply.blocks) :]
        codecs = (block.BlockCodec.RAW, *request.codecs)
        cold = await self.below.prefix(request.namespace, missing, codecs) if missing else Cold()
        if not cold.blocks:
            return reply
        if request.wait_s > 0:
            with anyio.move_on_after(min(request.wait_s, 0.8 * within_s)):  # the rest is for looking anew
                await self.promotion.bring_up(request.namespace, missing[: cold.blocks])
            better = await self._again(request, reply, again)
            left = request.hashes[len(better.blocks) : len(reply.blocks) + cold.blocks]
            share = len(left) / cold.blocks
            return replace(better, cold_blocks=len(left), load_s=share * cold.load_s)
        self._hint(request, len(reply.blocks), missing, cold)
        return replace(reply, cold_blocks=cold.blocks, load_s=cold.load_s)

    async def _again(self, request: kv.LookupRequest, reply: kv.LookupReply, again: LookUp) -> kv.LookupReply:
        try:
            better = await again()
        except CoveyError:
            return reply
        if reply.lease is not None:
            await self._memory.release(request.tenant, reply.lease)
        return better

    def _hint(self, request: kv.LookupRequest, depth: int, missing: Sequence[BlockHash], cold: Cold) -> None:
        """Nobody waits, but who asked for these may ask again: bring them up if that is likely to pay."""
        chain = Chain(tenant=request.tenant, size_bytes=cold.size_bytes, depth=depth)
        if self._memory.has_room(cold.size_bytes) and self._policy.can_promote(chain, cold.load_s):
            self.promotion.start(request.namespace, missing[: cold.blocks])

    # -- writing -----------------------------------------------------------------

    def note_written(self) -> None:
        """Say that blocks came: memory may be fuller than it should be."""
        if self.below.tiers:
            self._mover.wake()

    def check_durable(self) -> None:
        """Raises `FailedPrecondition` when no tier could make a commit durable."""
        if not self.below.tiers:
            raise FailedPrecondition("this node keeps blocks in memory only: set disk.path or remote.url", field="ack")

    async def make_durable(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> None:
        """Return when committed blocks would survive a loss of power. Raises `Unavailable` when not.

        Then they are stored in memory all the same: the writer may commit again, and nothing is written twice.
        """
        truth = self.below.tiers[-1]
        for name in reversed(hashes):  # the last one brings all that it grows from, and what else is not yet synced
            if name != hashes[-1] and truth.knows(namespace, name):
                continue
            if not await self._demotion.copy_down(namespace, name, durable=True):
                raise Unavailable("stored in memory, but no tier below takes it now", field="ack", retry_after_ms=1000)

    async def save(self, within_s: float) -> int:
        """Copy down as much of memory as that time allows, for the next life of this node; returns how many blocks."""
        saved = 0
        if not self.below.tiers:
            return saved
        with anyio.move_on_after(within_s):
            for namespace, hashes in await self._memory.all_of(NamespaceId(b"")):
                for name in hashes:
                    saved += await self._demotion.copy_down(namespace, name)
        return saved

    # -- tasks -------------------------------------------------------------------

    async def prefetch(self, task: kv_state.StartTask, progress: Progress) -> str:
        """Bring a chain up, from its first block that is not in memory on. Raises `InvalidArgument`."""
        if not task.hashes:
            raise InvalidArgument("name the blocks to bring up", field="hashes")
        there = _leading(task.hashes, await self._memory.visible(task.namespace, task.hashes))
        cold = await self.below.prefix(task.namespace, task.hashes[there:])
        progress.expect(cold.blocks)
        came = 0
        for flight in self.promotion.start(task.namespace, task.hashes[there : there + cold.blocks]):
            await flight.landed.wait()
            came += flight.arrived
            progress.step(flight.arrived)
        return f"{there} blocks were in memory, {came} of {cold.blocks} came up"

    def scrub_after(self, memory: Handler) -> Handler:
        """Return a handler that scrubs memory, then, if no blocks are named, all tiers that this node answers for."""

        async def scrub(task: kv_state.StartTask, progress: Progress) -> str:
            found = await memory(task, progress)
            if task.hashes or task.namespace:
                return found
            for tier in self.below.tiers:
                progress.expect(progress.total + tier.stats().blocks)
                found += f"; {tier.kind}: {await tier.scrub(progress.step)} bad"
            return found

        return scrub

    async def demote(self, task: kv_state.StartTask, progress: Progress) -> str:
        """Copy blocks down and let them go from memory, unless somebody needs them there; all, if none are named.

        Raises `Unavailable` when a tier does not take them, `FailedPrecondition` when there is no such tier.
        """
        if task.tier not in {tier.kind for tier in self.below.tiers}:
            raise FailedPrecondition(f"this node has no tier {task.tier} to move blocks to", field="tier")
        named = [(task.namespace, task.hashes)] if task.hashes else await self._memory.all_of(task.namespace)
        progress.expect(sum(len(hashes) for _, hashes in named))
        gone = 0
        for namespace, hashes in named:
            for name in await self._memory.visible(namespace, hashes):
                if not await self._demotion.copy_down(namespace, name):
                    raise Unavailable("a tier below does not take blocks now")
                progress.step()
            gone += await self._memory.drop(namespace, hashes)
        return f"{progress.done} blocks lie below, {gone} of them no longer in memory"

    # -- views -------------------------------------------------------------------

    def stats(self, memory: kv_state.StoreStats) -> kv_state.StoreStats:
        """Return the store's counts with those of every tier."""
        first = kv_state.TierStats(
            tier=kv_state.Tier.MEMORY, blocks=memory.blocks, used_bytes=memory.used_bytes,
            capacity_bytes=memory.capacity_bytes,
        )  # fmt: skip
        bad = sum(tier.counts.quarantined for tier in self.below.tiers)
        return replace(memory, tiers=(first, *self.below.stats()), quarantined=memory.quarantined + bad)

    def metrics(self) -> Mapping[tuple[str, ...], float]:
        """Counts by tier, for scraping."""
        values: dict[tuple[str, ...], float] = {}
        for tier, stats in zip(self.below.tiers, self.below.stats(), strict=True):
            name = tier.kind.lower()
            values |= {(name, what): float(count) for what, count in asdict(tier.counts).items()}
            values |= {
                (name, "blocks"): float(stats.blocks),
                (name, "used_bytes"): float(stats.used_bytes),
                (name, "capacity_bytes"): float(stats.capacity_bytes),
                (name, "writable"): float(stats.writable),
                (name, "index_bytes"): float(tier.index_bytes),
                (name, "bytes_per_s"): self.below.meters[tier.kind].bytes_per_s,
            }
        values["memory", "promoted"] = float(self.promotion.promoted)
        values["memory", "promotions_in_flight"] = float(self.promotion.in_flight)
        values["memory", "demoted"] = float(self._demotion.demoted)
        return values


def _leading(hashes: Sequence[BlockHash], there: Sequence[BlockHash]) -> int:
    found = set(there)
    return next((at for at, name in enumerate(hashes) if name not in found), len(hashes))
