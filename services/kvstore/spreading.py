"""Walks over a node's blocks and brings them to the nodes that they are owed to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Final, TypeAlias, TypeVar

from covey.actor import Ref
from covey.errors import CoveyError
from covey.net.kv.copier import Copier
from covey.policy.rebalance import Duty
from covey.policy.store_index import Placed
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv import BlockKey
from covey.types.store import StoreKey

from .store import Command, Store
from .tasks import Progress

COMMAND_TIMEOUT_S: Final = 10.0
CHUNK_BLOCKS: Final = 512
"""Blocks looked at with one command to the index, so that others get in between."""

ROOTS_MAX: Final = 65_536

R = TypeVar("R")
Duties: TypeAlias = Callable[[NamespaceId, BlockHash], Duty]
"""What is owed to a chain, by its namespace and first block."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Spread:
    """What became of blocks. `late` ones are not where they should be: a node is away or full."""

    blocks: int = 0
    dropped: int = 0
    late: set[BlockHash] = field(default_factory=set)
    lossy: set[BlockHash] = field(default_factory=set)
    """Blocks in a lossy codec stay where they are: a copy is written as it was computed, or not at all."""

    def has(self, name: BlockHash) -> bool:
        """Whether a block is everywhere it should be."""
        return name not in self.late and name not in self.lossy


class Spreader:
    """Copies at the copier's pace and drops what was given up."""

    def __init__(self, actor: Ref[Command[object]], copier: Copier) -> None:
        self.dropped_blocks = 0
        self.waiting_blocks = 0
        self._actor = actor
        self._copier = copier
        self._roots: dict[BlockHash, BlockHash] = {}
        """First blocks of chains met lately, by name alone: a name is a hash of all that is before it."""

    @property
    def copied_blocks(self) -> int:
        return self._copier.copied_blocks

    async def sweep(self, duties: Duties, progress: Progress | None = None) -> Spread:
        """Walk over all shared blocks, parents first: copy what is owed, then drop what is not ours to keep."""
        done = Spread()
        duties = lru_cache(ROOTS_MAX)(duties)  # asked for each block, the same for a whole chain
        spaces = await self._ask(lambda store, _: tuple(store.index.snapshot()))
        self.waiting_blocks = sum(len(names) for _, names in spaces)
        if progress is not None:
            progress.expect(self.waiting_blocks)
        try:
            for namespace, names in spaces:
                given_up: list[BlockHash] = []
                roots: dict[BlockHash, BlockHash] = {}
                for start in range(0, len(names), CHUNK_BLOCKS):
                    chunk = names[start : start + CHUNK_BLOCKS]
                    placed = await self.visible(namespace, chunk)
                    roots.update(_roots(placed, roots))
                    await self._copy(placed, roots, duties, done)
                    given_up += (
                        name
                        for name in (each.location.hash for each in placed)
                        if done.has(name) and not duties(namespace, roots[name]).keep
                    )
                    self.waiting_blocks -= len(chunk)
                    if progress is not None:
                        progress.step(len(chunk))
                done.dropped += await self._drop(namespace, given_up)
        finally:
            self.waiting_blocks = 0
        return done

    async def spread(self, namespace: NamespaceId, hashes: Sequence[BlockHash], duties: Duties) -> Spread:
        """Do the same for some blocks of one namespace, parents first."""
        done = Spread()
        placed, roots = await self._ask(partial(_find, namespace, hashes, self._roots))
        self._roots.update(roots)
        while len(self._roots) > ROOTS_MAX:
            del self._roots[next(iter(self._roots))]
        await self._copy(placed, roots, duties, done)
        names = (each.location.hash for each in placed)
        given_up = [name for name in names if done.has(name) and not duties(namespace, roots[name]).keep]
        done.dropped = await self._drop(namespace, given_up)
        return done

    async def visible(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> tuple[Placed, ...]:
        """Return those of the named blocks that are stored."""
        return await self._ask(lambda store, _: store.index.visible(namespace, hashes))

    async def _copy(
        self, placed: Sequence[Placed], roots: dict[BlockHash, BlockHash], duties: Duties, done: Spread
    ) -> None:
        lots: dict[tuple[WorkerId, StoreKey], list[BlockKey]] = {}
        for each in placed:
            name = each.location.hash
            owed = duties(each.namespace, roots[name]).to
            if owed and each.codec is not BlockCodec.RAW:
                done.lossy.add(name)
                continue
            key = StoreKey(tenant=each.tenant, namespace=each.namespace, shape=each.shape)
            for to in owed:
                lots.setdefault((to, key), []).append(BlockKey(hash=name, parent=each.parent))
        for (to, key), blocks in lots.items():
            try:
                there = await self._copier.copy(key, blocks, to)
            except CoveyError as error:
                log.info("not copied to %s: %s", to, error)
                there = 0
            if there < len(blocks):
                done.late.update(block.hash for block in blocks)
        done.blocks += len(placed)

    async def _drop(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> int:
        dropped = 0
        for end in range(len(hashes), 0, -CHUNK_BLOCKS):
            chunk = hashes[max(0, end - CHUNK_BLOCKS) : end]
            dropped += await self._ask(partial(_drop, namespace, chunk))
        self.dropped_blocks += dropped
        return dropped

    async def _ask(self, act: Callable[[Store, float], R]) -> R:
        return await self._actor.ask(Command(act=act), timeout_s=COMMAND_TIMEOUT_S)


def _drop(namespace: NamespaceId, hashes: Sequence[BlockHash], store: Store, now: float) -> int:
    return store.index.drop(namespace, hashes, now)


def _find(
    namespace: NamespaceId, hashes: Sequence[BlockHash], known: Mapping[BlockHash, BlockHash], store: Store, _: float
) -> tuple[tuple[Placed, ...], dict[BlockHash, BlockHash]]:
    """Return blocks and the first block of each one's chain, walking up from each as far as that is not `known`."""
    placed = store.index.visible(namespace, hashes)
    roots: dict[BlockHash, BlockHash] = {}
    for each in placed:
        path, at = [each.location.hash], each.parent
        while at and at not in roots and at not in known:
            above = store.index.visible(namespace, (at,))
            path.append(at)
            at = above[0].parent if above else BlockHash(b"")
        roots.update(dict.fromkeys(path, roots.get(at) or known.get(at) or path[-1]))
    return placed, roots


def _roots(placed: Sequence[Placed], known: dict[BlockHash, BlockHash]) -> dict[BlockHash, BlockHash]:
    """Return the first block of each one's chain; parents come first, so theirs are known."""
    roots: dict[BlockHash, BlockHash] = {}
    for each in placed:
        above = roots.get(each.parent) or known.get(each.parent) or each.parent
        roots[each.location.hash] = above or each.location.hash
    return roots
