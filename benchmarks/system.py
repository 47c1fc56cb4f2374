"""A system under measurement: something that starts, answers chat requests over HTTP, and stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from benchmarks.memory import pss_bytes
from covey.cli.mesh import MeshPlan, running
from covey.cli.state import http_client
from covey.cli.up import publish
from covey.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A started system: a client at its address, how long it took to be ready, and its processes by name."""

    client: httpx.AsyncClient
    ready_s: float
    pids: Mapping[str, int]

    def memory_bytes(self) -> dict[str, int]:
        """Proportional set size of each process, and their sum as `total`."""
        sizes = {name: pss_bytes(pid) for name, pid in self.pids.items()}
        return sizes | {"total": sum(sizes.values())}


class System(Protocol):
    """What is measured. `name` is its word in rows and ratios; `extra` are fields of a request that only it has."""

    @property
    def name(self) -> str: ...

    @property
    def extra(self) -> Mapping[str, Any]: ...

    def serving(self) -> AbstractAsyncContextManager[Serving]:
        """Start it, yield it, and stop it whatever happened. Raises CoveyError when it does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Covey:
    """A whole mesh of our own."""

    plan: MeshPlan
    clock: Clock
    name: str = "covey"
    extra: Mapping[str, Any] = field(default_factory=lambda: {"cache": "bypass"})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Serving]:
        began = self.clock.now()
        async with running(self.plan) as mesh:
            ready_s = self.clock.now() - began
            pids = {name: child.pid for name, child in mesh.children.items()} | {"nats": mesh.nats.pid}
            async with http_client(publish(mesh)) as client:
                yield Serving(client=client, ready_s=ready_s, pids=pids)
