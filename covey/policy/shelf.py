"""The blocks that a store has: what is visible, what may go, and what goes first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from covey.errors import LayoutMismatch
from covey.policy.arena import Arena
from covey.policy.slot import slot_bytes
from covey.policy.store_block import Block, BlockState, EvictionQueue, EvictionScore
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockCodec, BlockShape, KvEventKind, StoreStats


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChange:
    """What watchers of the store are told; private blocks never appear here."""

    kind: KvEventKind
    namespace: NamespaceId
    hashes: tuple[BlockHash, ...]


@dataclass(slots=True, eq=False)
class Space:
    """One namespace: all its blocks have one geometry."""

    shape: BlockShape
    slot_bytes: int
    blocks: dict[BlockHash, Block] = field(default_factory=dict)


class Shelf:
    """Blocks of all namespaces over one arena. Knows that blocks are held, not by whom."""

    def __init__(self, *, arena: Arena, blocks_max: int, score: EvictionScore) -> None:
        self.arena = arena
        self.blocks = 0
        self.pinned_bytes = 0
        self._blocks_max = blocks_max
        self._spaces: dict[NamespaceId, Space] = {}
        self._queue = EvictionQueue(score)
        self._cooling: deque[tuple[float, int]] = deque()
        self._changes: list[IndexChange] = []
        self._generation = 0
        self._reserved = self._private = self._held = self._pinned = self._evictions = self._quarantined = 0

    # -- finding -----------------------------------------------------------------

    def space(self, namespace: NamespaceId, shape: BlockShape) -> Space:
        """Return a namespace, a new one if it has no blocks. Raises `LayoutMismatch` and `InvalidArgument`."""
        space = self._spaces.get(namespace)
        if space is None:
            return Space(shape=shape, slot_bytes=slot_bytes(shape))
        if space.shape != shape:
            raise LayoutMismatch(
                f"blocks of this namespace have {space.shape.size_bytes} bytes in {space.shape.layers} layers",
                field="shape",
            )
        return space

    def prefix(self, namespace: NamespaceId, hashes: Sequence[BlockHash], shape: BlockShape | None) -> list[Block]:
        """Return the longest prefix of `hashes` that is visible. Raises `LayoutMismatch`."""
        known = self._spaces.get(namespace)
        if known is None:
            return []
        space = known if shape is None else self.space(namespace, shape)
        found = []
        for name in hashes:
            block = space.blocks.get(name)
            if block is None or block.state is not BlockState.COMMITTED:
                break
            found.append(block)
        return found

    def visible(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> list[Block]:
        """Return those of the named shared blocks that are visible."""
        space = self._spaces.get(namespace)
        found = [] if space is None else [space.blocks[name] for name in hashes if name in space.blocks]
        return [block for block in found if block.state is BlockState.COMMITTED and not block.private]

    # -- coming ------------------------------------------------------------------

    def add(
        self, namespace: NamespaceId, space: Space, name: BlockHash, parent: Block | None, *, private: bool,
        tenant: TenantId,
    ) -> Block | None:  # fmt: skip
        """Reserve a slot, evicting what nobody needs; None when there is no room."""
        offset = self._room(space.slot_bytes)
        if offset is None:
            return None
        self._generation += 1
        block = Block(
            namespace=namespace,
            name=name,
            parent=parent,
            private=private,
            offset=offset,
            shape=space.shape,
            slot_bytes=space.slot_bytes,
            generation=self._generation,
            tenant=tenant,
        )
        if parent is not None:
            parent.children += 1
        self._spaces[namespace] = space
        space.blocks[name] = block
        self.blocks += 1
        self._reserved += 1
        self._private += private
        return block

    def draft(self, block: Block, size_bytes: int, codec: BlockCodec) -> Block | None:
        """Take a slot for a new version of a visible block; None when there is no room."""
        shape = replace(block.shape, size_bytes=size_bytes)
        offset = self._room(slot_bytes(shape))
        if offset is None:
            return None
        self._generation += 1
        return Block(
            namespace=block.namespace, name=block.hash, parent=block.parent, private=block.private, offset=offset,
            shape=shape, slot_bytes=slot_bytes(shape), generation=self._generation, tenant=block.tenant, codec=codec,
        )  # fmt: skip

    def swap(self, draft: Block, digest: int) -> bool:
        """Put a new version in the place of what is visible; the old slot goes when its leases have ended."""
        space = self._spaces.get(draft.namespace)
        old = space.blocks.get(draft.hash) if space is not None else None
        if space is None or old is None or old.state is not BlockState.COMMITTED:
            self.drop_draft(draft)
            return False
        draft.state, draft.digest, draft.last_used = BlockState.COMMITTED, digest, old.last_used
        draft.parent, draft.children = old.parent, old.children
        for child in space.blocks.values():
            if child.parent is old:
                child.parent = draft
        space.blocks[draft.hash] = draft
        old.state = BlockState.DOOMED
        self.tell(KvEventKind.RECODED, [draft])
        self._settle(old)
        self._settle(draft)
        return True

    def drop_draft(self, draft: Block) -> None:
        draft.state = BlockState.GONE
        self.arena.free(draft.offset)

    def coldest(self, count: int) -> list[Block]:
        """Return the blocks to evict next, worst first."""
        return self._queue.coldest(count)

    def seal(self, block: Block, digest: int) -> None:
        """Make a reserved block visible; the caller holds it."""
        block.state, block.digest = BlockState.COMMITTED, digest
        self._reserved -= 1

    def hold(self, block: Block, now: float, *, pin: bool) -> None:
        """Keep a block for one more lease."""
        block.last_used = now
        block.held += 1
        self._held += block.held == 1
        if pin:
            block.pins += 1
            if block.pins == 1:
                self._pinned += 1
                self.pinned_bytes += block.slot_bytes

    # -- going -------------------------------------------------------------------

    def unhold(self, block: Block, *, pin: bool) -> None:
        """A lease on a block ended."""
        block.held -= 1
        self._held -= not block.held
        if pin:
            block.pins -= 1
            if not block.pins:
                self._pinned -= 1
                self.pinned_bytes -= block.slot_bytes
        self._settle(block)

    def discard(self, block: Block, *, cool_until: float | None) -> None:
        """Drop a reservation; its slot rests until `cool_until`, in case its writer still writes."""
        block.state = BlockState.GONE
        self._reserved -= 1
        self._unlink(block)
        if cool_until is None:
            self.arena.free(block.offset)
        else:
            self._cooling.append((cool_until, block.offset))

    def next_due(self) -> float | None:
        """When the next slot has cooled."""
        return self._cooling[0][0] if self._cooling else None

    def thaw(self, now: float) -> None:
        """Free what has cooled."""
        while self._cooling and self._cooling[0][0] <= now:
            self.arena.free(self._cooling.popleft()[1])

    def quarantine(self, namespace: NamespaceId, name: BlockHash) -> bool:
        """Take a bad block out for good, and from view all that grows from it; False when it is not visible."""
        space = self._spaces.get(namespace)
        block = space.blocks.get(name) if space is not None else None
        if block is None or block.state is not BlockState.COMMITTED:
            return False
        self._quarantined += 1
        self.arena.retire(block.offset)
        self._doom(block)
        return True

    def drop(self, block: Block) -> bool:
        """Evict one block, unless somebody needs it."""
        if not block.evictable:
            return False
        self._evict(block)
        return True

    # -- views -------------------------------------------------------------------

    def tell(self, kind: KvEventKind, blocks: Sequence[Block]) -> None:
        """Note a change for the watchers."""
        shared = [block for block in blocks if not block.private]
        if not shared:
            return
        namespace, names = shared[0].namespace, tuple(block.hash for block in shared)
        last = self._changes[-1] if self._changes else None
        if last is not None and (last.kind, last.namespace) == (kind, namespace):
            self._changes[-1] = IndexChange(kind=kind, namespace=namespace, hashes=last.hashes + names)
        else:
            self._changes.append(IndexChange(kind=kind, namespace=namespace, hashes=names))

    def drain_changes(self) -> tuple[IndexChange, ...]:
        """Return what became visible or went since the last call, in order."""
        changes, self._changes = tuple(self._changes), []
        return changes

    def snapshot(self) -> Iterator[tuple[NamespaceId, tuple[BlockHash, ...]]]:
        """Yield each namespace's shared blocks, parents first."""
        for namespace, space in self._spaces.items():
            shared = [b for b in space.blocks.values() if b.state is BlockState.COMMITTED and not b.private]
            if shared:
                yield namespace, tuple(block.hash for block in sorted(shared, key=lambda block: block.depth))

    def every(self) -> Iterator[Block]:
        """Yield all blocks that are reserved or visible."""
        for space in self._spaces.values():
            yield from space.blocks.values()

    def stats(self, *, leases: int, hits: int, misses: int) -> StoreStats:
        """Count what is there; reads counters only, so another thread may call it."""
        return StoreStats(
            blocks=self.blocks - self._reserved,
            used_bytes=self.arena.used_bytes,
            capacity_bytes=self.arena.capacity_bytes,
            leases=leases,
            leased_blocks=self._held,
            pinned_blocks=self._pinned,
            pinned_bytes=self.pinned_bytes,
            reserved_blocks=self._reserved,
            private_blocks=self._private,
            hits=hits,
            misses=misses,
            evictions=self._evictions,
            quarantined=self._quarantined,
        )

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self.arena.check()
        blocks = list(self.every())
        assert len(blocks) == self.blocks <= self._blocks_max
        assert self._reserved == sum(block.state is BlockState.RESERVED for block in blocks)
        assert self._private == sum(block.private for block in blocks)
        children: dict[Block, int] = {}
        for block in blocks:
            assert self._spaces[block.namespace].blocks[block.hash] is block
            assert block.state in {BlockState.RESERVED, BlockState.COMMITTED}
            assert 0 <= block.pins <= block.held
            if block.parent is not None:
                children[block.parent] = children.get(block.parent, 0) + 1
                if block.state is BlockState.COMMITTED:
                    assert block.parent.state is BlockState.COMMITTED, "visible without its parent"
            if block.private and block.state is BlockState.COMMITTED:
                assert block.held, "a private block outlived its leases"
            assert self._queue.holds(block) == block.evictable
        for block in blocks:
            assert block.children == children.get(block, 0)
        assert all(space.blocks for space in self._spaces.values()), "an empty namespace was kept"
        offsets = [block.offset for block in blocks]
        assert len(set(offsets)) == len(offsets), "two blocks share a slot"

    # -- inside ------------------------------------------------------------------

    def _room(self, size: int) -> int | None:
        while True:
            offset = self.arena.allocate(size) if self.blocks < self._blocks_max else None
            if offset is not None:
                return offset
            victim = self._victim(size)
            if victim is None:
                return None
            self._evict(victim)

    def _victim(self, size: int) -> Block | None:
        """The worst of the same size once that size has its fair share of the arena, else the worst of all."""
        fair_bytes = self.arena.capacity_bytes // max(1, self.arena.sizes)
        own = self._queue.worst(size)
        if own is not None and self.arena.bytes_of(size) >= fair_bytes:
            return own
        return self._queue.worst()

    def _evict(self, block: Block) -> None:
        self._evictions += 1
        self.tell(KvEventKind.EVICTED, [block])
        block.state = BlockState.GONE
        self.arena.free(block.offset)
        self._unlink(block)

    def _settle(self, block: Block) -> None:
        """Something let go of a block: free it, make it vanish or let it be evicted, if that is due."""
        if block.held:
            return
        if block.state is BlockState.DOOMED:
            block.state = BlockState.GONE
            if not self.arena.is_retired(block.offset):
                self.arena.free(block.offset)
        elif block.state is BlockState.COMMITTED and block.private:
            self._doom(block)
        elif block.evictable:
            self._queue.push(block)
            self._queue.compact(self.blocks)

    def _doom(self, block: Block) -> None:
        """Take a block and all visible ones that grow from it out of view; slots go when their leases have ended."""
        gone = [block, *self._descendants(block)] if block.children else [block]
        self.tell(KvEventKind.EVICTED, gone)
        for each in gone:
            each.state = BlockState.DOOMED
        for each in reversed(gone):
            self._unlink(each)
        for each in gone:
            self._settle(each)

    def _descendants(self, block: Block) -> list[Block]:
        children: dict[Block, list[Block]] = {}
        for other in self._spaces[block.namespace].blocks.values():
            if other.parent is not None and other.state is BlockState.COMMITTED:
                children.setdefault(other.parent, []).append(other)
        found = list(children.get(block, ()))
        for each in found:  # grows while it is walked
            found.extend(children.get(each, ()))
        return found

    def _unlink(self, block: Block) -> None:
        space = self._spaces[block.namespace]
        del space.blocks[block.hash]
        if not space.blocks:
            del self._spaces[block.namespace]
        self.blocks -= 1
        self._private -= block.private
        parent = block.parent
        if parent is not None:
            parent.children -= 1
            self._settle(parent)
