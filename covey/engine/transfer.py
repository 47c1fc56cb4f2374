"""Blocks between the worker's pool and the store: what is missing or late is a miss, never an error of the request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import anyio

from covey.clock import Clock
from covey.errors import CoveyError, DeadlineExceeded
from covey.model.plan import Runner, RunnerInfo
from covey.types.ids import NamespaceId, TenantId
from covey.types.kv import BlockKey, BlockShape, KvElement
from covey.types.store import BlockStore, Held, StoreKey

from .chain import Stretch

RELEASE_TIMEOUT_S = 1.0
"""A lease that cannot be given back by then ends by itself."""


_ELEMENTS = {"fp32": KvElement.FP32, "fp16": KvElement.FP16, "int8": KvElement.INT8}

Spawn = Callable[..., None]
"""Runs an async function with its arguments in the actor's task group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """`blocks` leading blocks are there and checked; where the time went, in seconds."""

    blocks: int
    lookup_s: float
    transfer_s: float


def shape_of(info: RunnerInfo) -> BlockShape:
    """What the store and its codecs need to know of a runner's blocks."""
    if not info.kv_heads:
        return BlockShape(size_bytes=info.block_bytes, layers=info.n_layers)
    return BlockShape(
        size_bytes=info.block_bytes,
        layers=info.n_layers,
        element=_ELEMENTS.get(info.kv_dtype, KvElement.OPAQUE),
        kv_heads=info.kv_heads,
        head_dim=info.head_dim,
        tokens=info.block_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """An unfinished block: private to its request."""

    tenant: TenantId
    namespace: NamespaceId
    key: BlockKey


class Transfers:
    """Copies blocks of the runner's pool from and to a `BlockStore`, each call under one deadline."""

    def __init__(self, store: BlockStore, runner: Runner, clock: Clock, *, timeout_s: float) -> None:
        self._store = store
        self._runner = runner
        self._clock = clock
        self._timeout_s = timeout_s
        self._shape = shape_of(runner.info)

    async def fetch(
        self, tenant: TenantId, stretches: Sequence[Stretch], blocks: Sequence[int], *, skip: int, owner: str
    ) -> Fetched:
        """Load the longest stored prefix of a chain, after its first `skip` blocks, into `blocks`, in order.

        `stretches` begin with the chain's first block: the store finds the rest of a chain by its start.
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
                        count = await self._load(held, blocks[good : good + len(held.hashes)])
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
                    key = StoreKey(tenant=tenant, namespace=stretch.namespace, shape=self._shape)
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

    @asynccontextmanager
    async def _leased(self, tenant: TenantId, stretch: Stretch, known: int, owner: str) -> AsyncIterator[Held]:
        """Lease what is stored of a stretch after its first `known` blocks."""
        key = StoreKey(tenant=tenant, namespace=stretch.namespace, shape=self._shape)
        hashes = [name.hash for name in stretch.keys]
        leases = [await self._store.lookup(key, hashes, owner=owner, ttl_s=2 * self._timeout_s)]
        try:
            if known:
                wanted = leases[0].hashes[known:]
                leases.append(await self._store.lookup(key, wanted, owner=owner, ttl_s=2 * self._timeout_s))
            yield leases[-1]
        finally:
            await self.release(leases)

    async def _load(self, held: Held, blocks: Sequence[int]) -> int:
        if not held.hashes:
            return 0
        with self._views(blocks) as views:
            return await self._store.load(held, views)

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
