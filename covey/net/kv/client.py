"""The store over all its nodes: `BlockStore` for engines, by shared memory or gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from covey.clock import Clock
from covey.codec.methods import KvStore
from covey.errors import CoveyError, InvalidArgument, LeaseExpired, Miss, Pending, Unavailable
from covey.net.kv.access import Access
from covey.net.kv.config import KvClientConfig
from covey.net.kv.held import NothingHeld, StoreHeld, enter
from covey.net.kv.node import ChannelSource, Node, StoreNode
from covey.net.kv.partial import Partial
from covey.net.kv.ring import Ring, RingSettings, no_ring
from covey.types.ids import BlockHash, WorkerId
from covey.types.kv import BlockKey, PinKind, PinRequest, ReserveRequest
from covey.types.kv_state import RingVersion
from covey.types.store import Held, Ready, StoreKey

LOADER = "load"
"""Owner of the lease under which blocks of a writer's lease or a pin are read."""


class KvClient:
    """Blocks by name over the nodes there are. A whole chain lives on one node, chosen by its first hash.

    Ask for a chain from its first block on; a part that starts later must continue what this client has looked
    up or stored. A node that is gone is a miss for readers, and writers go on to the next one.
    """

    def __init__(
        self, nodes: Callable[[], Sequence[StoreNode]], channels: ChannelSource, *, clock: Clock, boot_id: str,
        config: KvClientConfig | None = None, agreed: Callable[[], RingVersion | None] = no_ring,
    ) -> None:  # fmt: skip
        """`nodes` returns who is there now, `agreed` who owns blocks; `boot_id` is this host's."""
        self._config = config or KvClientConfig()
        self._clock = clock
        self._ring = Ring(
            nodes,
            channels,
            clock=clock,
            boot_id=boot_id if self._config.transport in {"auto", "shm"} else "",
            agreed=agreed,
            settings=RingSettings(
                timeout_s=self._config.call_timeout_s,
                stall_s=self._config.stall_timeout_s,
                nodes_tried=self._config.nodes_tried,
                roots_max=self._config.roots_max,
                settling_s=self._config.settling_s,
            ),
        )
        self._access = Access(self._config, clock)

    # -- BlockStore --------------------------------------------------------------

    async def lookup(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Lease the longest stored prefix of `hashes`; nodes that do not answer are a miss."""
        if not hashes:
            return NothingHeld()
        root = self._ring.root(key.namespace, hashes[0])
        for node in self._ring.readers(key.namespace, root):
            try:
                held = await self._access.lookup(node, key, tuple(hashes), owner, ttl_s)
            except Unavailable:
                self._ring.unsettle()
                continue
            if held is not None:
                self._ring.remember(key.namespace, held.hashes, root)
                return held
            if self._ring.is_settled:
                break
        return NothingHeld()

    async def load(self, held: Held, into: Sequence[memoryview], *, ready: Ready | None = None) -> int:
        """Copy leased blocks into buffers, verified; return how many leading ones are good. Raises `LeaseExpired`.

        With `ready`, layer by layer over all blocks.
        """
        if not isinstance(held, StoreHeld):
            return 0
        held.check()
        if len(held.locations) < len(held.hashes):  # a writer's lease or a pin says what it covers, not where
            return await self._load_anew(held, into, ready)
        size_bytes, count = held.key.shape.size_bytes, min(len(held.locations), len(into))
        buffers = [_flat(view, size_bytes, f"into[{i}]") for i, view in enumerate(into[:count])]
        partial = Partial(held, buffers, ready)
        expired: LeaseExpired | None = None
        try:
            await self._access.load(held, partial)
        except LeaseExpired as error:
            expired = error
        if not partial.is_whole:
            await self._load_elsewhere(held, partial)
        if expired is not None and not partial.is_whole:
            raise expired
        return partial.good

    async def store(
        self, key: StoreKey, blocks: Sequence[BlockKey], data: Sequence[memoryview], *, owner: str, ttl_s: float,
        private: bool = False,
    ) -> Held:  # fmt: skip
        """Write blocks that are not there yet and lease them all.

        Waits, for at most `ttl_s`, for blocks that another client is writing, and takes over if it dies. Raises
        `NoSpace`, `QuotaExceeded` and `Unavailable`; then nothing stays reserved.
        """
        if len(blocks) != len(data):
            raise InvalidArgument("each block needs its data", field="data")
        if not blocks:
            return NothingHeld()
        buffers = [_flat(view, key.shape.size_bytes, f"data[{i}]") for i, view in enumerate(data)]
        request = _reserve_request(key, blocks, owner, ttl_s, private=private)
        root = self._ring.root(key.namespace, blocks[0].parent or blocks[0].hash)
        problem: CoveyError = Unavailable("no kvstore takes blocks")
        for node in self._ring.writers(key.namespace, root):
            try:
                held = await self._access.store(node, key, request, buffers)
            except Unavailable as error:
                self._ring.unsettle()
                problem = error
                continue
            except (Miss, Pending) as error:
                raise Unavailable(f"not stored: {error.message}") from error
            self._ring.remember(key.namespace, held.hashes, root)
            return held
        raise problem

    async def pin(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Keep the stored prefix of `hashes` from eviction for `ttl_s` seconds; nothing stored is nothing held."""
        if not hashes:
            return NothingHeld()
        request = PinRequest(
            tenant=key.tenant,
            namespace=key.namespace,
            hashes=tuple(hashes),
            kind=PinKind.HARD,
            ttl_s=ttl_s,
            owner=owner,
        )
        for node in self._ring.readers(key.namespace, self._ring.root(key.namespace, hashes[0])):
            asked_at = self._clock.now()
            try:
                reply = await enter(node, KvStore.PIN, request)
            except Unavailable:
                self._ring.unsettle()
                continue
            except Miss:
                if self._ring.is_settled:
                    break
                continue
            return StoreHeld(
                node=node,
                key=key,
                grant=reply.lease,
                asked_at=asked_at,
                clock=self._clock,
                hashes=request.hashes[: reply.blocks],
            )
        return NothingHeld()

    # -- one node ----------------------------------------------------------------

    async def lookup_on(
        self, worker: WorkerId, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float
    ) -> Held:
        """Lease the longest prefix that one node has; it is read as any other. Raises `Unavailable`."""
        held = await self._access.lookup(self._at(worker), key, tuple(hashes), owner, ttl_s)
        return NothingHeld() if held is None else held

    async def store_on(
        self, worker: WorkerId, key: StoreKey, blocks: Sequence[BlockKey], data: Sequence[memoryview], *, owner: str,
        ttl_s: float,
    ) -> Held:  # fmt: skip
        """Write blocks to one node. Raises `Unavailable`, `NoSpace`, `QuotaExceeded`, `Pending`, and `Miss` when it
        does not have what they grow from; then nothing stays reserved.
        """
        request = _reserve_request(key, blocks, owner, ttl_s, private=False)
        return await self._access.store(self._at(worker), key, request, data)

    def _at(self, worker: WorkerId) -> Node:
        node = self._ring.node(worker)
        if node is None:
            raise Unavailable(f"kvstore {worker} is not there")
        return node

    async def _load_anew(self, held: StoreHeld, into: Sequence[memoryview], ready: Ready | None) -> int:
        try:
            reader = await self._access.lookup(held.node, held.key, held.hashes, LOADER, held.grant.ttl_s)
        except Unavailable:
            return 0
        if reader is None:
            return 0
        try:
            return await self.load(reader, into, ready=ready)
        finally:
            await reader.release()

    async def _load_elsewhere(self, held: StoreHeld, partial: Partial) -> None:
        """Go on from the first missing block at the other nodes that may hold the chain."""
        root = self._ring.root(held.key.namespace, held.hashes[0])
        for node in self._ring.readers(held.key.namespace, root):
            if partial.is_whole:
                return
            if node.where.worker == held.node.where.worker:
                continue
            try:
                other = await self._access.lookup(node, held.key, partial.hashes, LOADER, held.grant.ttl_s)
            except Unavailable:
                self._ring.unsettle()
                continue
            if other is None:
                continue
            try:
                await self._access.load(other, partial)
            except LeaseExpired:
                continue
            finally:
                await other.release()


def _reserve_request(
    key: StoreKey, blocks: Sequence[BlockKey], owner: str, ttl_s: float, *, private: bool
) -> ReserveRequest:
    return ReserveRequest(
        tenant=key.tenant,
        namespace=key.namespace,
        blocks=tuple(blocks),
        shape=key.shape,
        owner=owner,
        ttl_s=ttl_s,
        private=private,
    )


def _flat(view: memoryview, size_bytes: int, field: str) -> memoryview:
    """Return a view as contiguous bytes. Raises `InvalidArgument` when it has another size."""
    if view.nbytes != size_bytes or not view.c_contiguous:
        raise InvalidArgument(
            f"a buffer of {size_bytes} contiguous bytes is needed, this has {view.nbytes}", field=field
        )
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
