"""Blocks between the worker's pool and the store: what is missing or late is a miss, never an error of the request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

import anyio

from covey.clock import Clock
from covey.errors import CoveyError, DeadlineExceeded
from covey.model.plan import Runner
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockKey
from covey.types.store import BlockStore, Held, Ready, StoreKey

from .chain import Stretch

RELEASE_TIMEOUT_S = 1.0
"""A lease that cannot be given back by then ends by itself."""

TAIL_READER = "tail"
"""Owner of the lease under which the unfinished block of a prompt is read ahead of the others."""

OnLayers = Callable[[int, int], None]
"""Called with (blocks, layers): so many blocks are on their way, and so many leading layers of each are there."""

Spawn = Callable[..., None]
"""Runs an async function with its arguments in the actor's task group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """`blocks` leading blocks are there and checked; where the time went, in seconds."""

    blocks: int
    lookup_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """An unfinished block: private to its request."""

    tenant: TenantId
    namespace: NamespaceId
    key: BlockKey


class Transfers:
    """Copies blocks of the runner's pool from and to a `BlockStore`, each call under one deadline."""

    def __init__(
        self, store: BlockStore, runner: Runner, clock: Clock, *, timeout_s: float, layers_min_bytes: int = 0
    ) -> None:
        """Loads of less than `layers_min_bytes` come whole, whoever waits for layers."""
        self._store = store
        self._runner = runner
        self._clock = clock
        self._timeout_s = timeout_s
        self._layers_min_bytes = layers_min_bytes
        self._shape = runner.info.shape

    async def fetch(
        self,
        tenant: TenantId,
        stretches: Sequence[Stretch],
        blocks: Sequence[int],
        *,
        skip: int,
        owner: str,
        has_tail: bool = False,
        on_layers: OnLayers | None = None,
    ) -> Fetched:
        """Load the longest stored prefix of a chain, after its first `skip` blocks, into `blocks`, in order.

        `stretches` begin with the chain's first block: the store finds the rest of a chain by its start. With
        `on_layers` what is found of the last one comes layer by layer. Only an unfinished block at the end, which
        `has_tail` announces, comes before and whole: its owner writes into it as soon as there is a layer.
        """
        good, lookup_s, transfer_s = 0, 0.0, 0.0
        with anyio.move_on_after(self._timeout_s):
            for stretch in stretches:
                known = min(skip, len(stretch.keys))
                skip -= known
                if known == len(stretch.keys):
                    continue
                began = self._clock.now()
                try:
                    async with self._leased(tenant, stretch, known, owner) as held:
                        found = self._clock.now()
                        lookup_s += found - began
                        into = blocks[good : good + len(held.hashes)]
                        is_whole = known + len(into) == len(stretch.keys)
                        is_small = len(into) * self._shape.size_bytes < self._layers_min_bytes
                        if on_layers is None or is_small or (is_whole and stretch is not stretches[-1]):
                            count = await self._load(held, into)
                        else:
                            key = self._key(tenant, stretch)
                            tail = held.hashes[-1:] if has_tail and is_whole else ()
                            count = await self._load_layers(key, held, into, tail, partial(_behind, on_layers, good))
                        transfer_s += self._clock.now() - found
                except CoveyError:
                    break
                good += count
                if known + count < len(stretch.keys):
                    break
        return Fetched(blocks=good, lookup_s=lookup_s, transfer_s=transfer_s)

    async def put(
        self, tenant: TenantId, stretches: Sequence[Stretch], blocks: Sequence[int], *, owner: str, ttl_s: float
    ) -> list[Held]:
        """Store the blocks that are not there yet and lease them all for `ttl_s`; the caller releases the leases.

        Raises NoSpace, QuotaExceeded, Unavailable or DeadlineExceeded; then no lease is left.
        """
        leases: list[Held] = []
        done = 0
        try:
            with self._deadline():
                for stretch in stretches:
                    key = self._key(tenant, stretch)
                    with self._views(blocks[done : done + len(stretch.keys)]) as views:
                        leases.append(await self._store.store(key, stretch.keys, views, owner=owner, ttl_s=ttl_s))
                    done += len(stretch.keys)
        except BaseException:
            await self.release(leases)
            raise
        return leases

    async def put_tail(self, tail: Tail, data: memoryview, *, owner: str, ttl_s: float) -> Held:
        """Store an unfinished block, private to its request. Raises as `put` does."""
        key = StoreKey(tenant=tail.tenant, namespace=tail.namespace, shape=self._shape)
        with self._deadline():
            return await self._store.store(key, (tail.key,), (data,), owner=owner, ttl_s=ttl_s, private=True)

    def copy(self, block: int) -> memoryview:
        """The bytes of a block as they are now, for a block that is still being filled."""
        with self._views((block,)) as (view,):
            return memoryview(bytes(view))

    async def release(self, leases: Sequence[Held]) -> None:
        """Give leases back, also when this task is being cancelled."""
        with anyio.move_on_after(RELEASE_TIMEOUT_S, shield=True):
            for held in leases:
                await held.release()

    def _key(self, tenant: TenantId, stretch: Stretch) -> StoreKey:
        return StoreKey(tenant=tenant, namespace=stretch.namespace, shape=self._shape)

    @asynccontextmanager
    async def _leased(self, tenant: TenantId, stretch: Stretch, known: int, owner: str) -> AsyncIterator[Held]:
        """Lease what is stored of a stretch after its first `known` blocks."""
        key = self._key(tenant, stretch)
        hashes = [name.hash for name in stretch.keys]
        leases = [await self._store.lookup(key, hashes, owner=owner, ttl_s=2 * self._timeout_s)]
        try:
            if known:
                wanted = leases[0].hashes[known:]
                leases.append(await self._store.lookup(key, wanted, owner=owner, ttl_s=2 * self._timeout_s))
            yield leases[-1]
        finally:
            await self.release(leases)

    async def _load(self, held: Held, blocks: Sequence[int], ready: Ready | None = None) -> int:
        if not held.hashes or not blocks:
            return 0
        with self._views(blocks) as views:
            if ready is None:
                return await self._store.load(held, views)
            return await self._store.load(held, views, ready=ready)

    async def _load_layers(
        self, key: StoreKey, held: Held, blocks: Sequence[int], tail: Sequence[BlockHash], on_layers: OnLayers
    ) -> int:
        """Load the unfinished block, if there is one, then the others layer by layer; return the leading good ones."""
        full, count = len(blocks) - len(tail), len(blocks) - len(tail)
        if tail:
            last = await self._store.lookup(key, tail, owner=TAIL_READER, ttl_s=2 * self._timeout_s)
            try:
                count += await self._load(last, blocks[full:])
            finally:
                await self.release((last,))
        good = await self._load(held, blocks[:full], lambda layers: on_layers(count, layers))
        return count if good == full else good

    @contextmanager
    def _views(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        views = [self._runner.block_view(block) for block in blocks]
        try:
            yield views
        finally:
            for view in views:
                view.release()

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        try:
            with anyio.fail_after(self._timeout_s):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded("the store did not take the blocks in time") from error


def _behind(on_layers: OnLayers, before: int, blocks: int, layers: int) -> None:
    """Say how far a stretch has come, counted with the blocks before it."""
    on_layers(before + blocks, layers)
