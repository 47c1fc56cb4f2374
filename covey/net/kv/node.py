"""One node of the store as a client sees it: its address, its arena if it is on this host, and its health."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import anyio
from anyio import to_thread

from covey.clock import Clock
from covey.codec.methods import KvStore, Unary
from covey.errors import CoveyError, DeadlineExceeded, Unavailable
from covey.net.channels import Channel
from covey.net.kv.bulk_connection import BulkPool
from covey.net.kv.mapping import ArenaMapping
from covey.net.registry import Registry
from covey.retry import Breaker
from covey.types.common import Empty
from covey.types.event import WorkerState
from covey.types.generate import Role
from covey.types.ids import WorkerId

Q = TypeVar("Q")
R = TypeVar("R")

OPEN_S = 0.5
"""How long a node that did not answer is left alone."""

WILDCARD_HOSTS = frozenset({"", "0.0.0.0", "::", "[::]"})  # noqa: S104 - what is replaced, not bound

BULK_KEPT_MAX = 4
"""Idle bulk connections that are kept for one node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreNode:
    """Where a node is; `capacity_bytes` weighs its share of chains. A draining one is read and not written.

    Nodes of one `host` fail together.
    """

    worker: WorkerId
    address: str
    capacity_bytes: int
    draining: bool = False
    host: str = ""


def nodes_of(registry: Registry) -> Callable[[], tuple[StoreNode, ...]]:
    """Return what tells a client which nodes the registry knows now."""

    def nodes() -> tuple[StoreNode, ...]:
        records = (view.record for view in registry.workers(Role.KVSTORE))
        return tuple(
            StoreNode(
                worker=record.worker,
                address=record.address,
                capacity_bytes=record.store.arena_bytes,
                draining=record.state is not WorkerState.READY,
                host=record.host,
            )
            for record in records
            if record.store is not None
        )

    return nodes


class ChannelSource(Protocol):
    """Where channels come from: `covey.net.rpc.Channels`."""

    def to(self, address: str) -> Channel: ...


class Node:
    """Calls to one node and the mapping of its arena."""

    def __init__(
        self, where: StoreNode, channels: ChannelSource, clock: Clock, *, boot_id: str, timeout_s: float,
        stall_s: float,
    ) -> None:  # fmt: skip
        """An empty `boot_id` never maps arenas; `stall_s` is how long a bulk channel may stand still in an exchange."""
        self.where = where
        self._channels = channels
        self._clock = clock
        self._boot_id = boot_id
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._breaker = Breaker(failures=1, open_s=OPEN_S)
        self._mapping: ArenaMapping | None = None
        self._bulk: BulkPool | None = None
        self._known_epoch: int | None = None
        self._lock = anyio.Lock()

    @property
    def channel(self) -> Channel:
        """The channel to the node. Raises `Overloaded` when too many are busy."""
        return self._channels.to(self.where.address)

    async def enter(self, method: Unary[Q, R], request: Q) -> R:
        """Make the first call of an operation; a node that just failed is not asked again for a moment.

        Raises:
            Unavailable: the node is gone or silent. Other errors are its answers.
        """
        attempt = self._breaker.attempt(self._clock.now())
        if attempt is None:
            raise Unavailable(f"kvstore {self.where.worker} did not answer a moment ago")
        try:
            reply = await self.channel.call(method, request, timeout_s=self._timeout_s)
        except (Unavailable, DeadlineExceeded) as error:
            self._breaker.fail(attempt, self._clock.now())
            raise Unavailable(f"kvstore {self.where.worker} does not answer") from error
        except CoveyError:
            self._breaker.succeed(attempt)
            raise
        except BaseException:
            self._breaker.cancel(attempt)
            raise
        self._breaker.succeed(attempt)
        return reply

    async def call(self, method: Unary[Q, R], request: Q) -> R:
        """Make a later call of an operation. Raises `Unavailable` for a silent node, or what it answers."""
        try:
            return await self.channel.call(method, request, timeout_s=self._timeout_s)
        except DeadlineExceeded as error:
            raise Unavailable(f"kvstore {self.where.worker} does not answer") from error

    async def mapping(self, epoch: int) -> ArenaMapping | None:
        """Return the arena of the node's life `epoch` if it can be mapped here; another life has another file."""
        await self._learn(epoch)
        return self._mapping

    async def bulk(self, epoch: int) -> BulkPool | None:
        """Return connections of the bulk channel of the node's life `epoch`, if it announces one."""
        await self._learn(epoch)
        return self._bulk

    async def _learn(self, epoch: int) -> None:
        async with self._lock:
            if self._known_epoch == epoch:
                return
            info = await self.call(KvStore.INFO, Empty())
            # Replaced, not closed: copies out of the old one may still run, and the last of them unmaps it.
            self._mapping = await to_thread.run_sync(ArenaMapping.open, info, self._boot_id) if self._boot_id else None
            self._bulk = None
            if info.bulk_address:
                self._bulk = BulkPool(
                    self._reachable(info.bulk_address),
                    self.channel.token,
                    stall_s=self._stall_s,
                    kept_max=BULK_KEPT_MAX,
                    clock=self._clock,
                )
            self._known_epoch = epoch

    def _reachable(self, address: str) -> str:
        """Replace a wildcard by the host that the node's calls go to."""
        host, _, port = address.rpartition(":")
        return f"{self.where.address.rpartition(':')[0]}:{port}" if host in WILDCARD_HOSTS else address
