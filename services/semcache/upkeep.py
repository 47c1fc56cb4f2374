"""The upkeep of the tables: expiry, new index generations in the background, their files, the levels in the metrics."""

from __future__ import annotations

import anyio
from anyio import to_thread

from covey import failpoint
from covey.clock import Clock

from .encoder import Embedder
from .entry import Shelf
from .graph import Graph, Segment
from .library import Library
from .memory import give_back_memory
from .metrics import CacheMetrics
from .vectors import VectorIndex

SAVE_MAX = 8192
"""Larger graphs are written when the process ends only: hnswlib holds the interpreter while it saves."""


class Upkeep:
    """One task that keeps the tables tidy; look-ups never wait for it."""

    def __init__(
        self, library: Library, embedder: Embedder, metrics: CacheMetrics, clock: Clock, *, every_s: float
    ) -> None:
        self._library = library
        self._store = library.store
        self._embedder = embedder
        self._metrics = metrics
        self._clock = clock
        self._every_s = every_s
        self._building = anyio.CapacityLimiter(1)

    async def run(self) -> None:
        """Tidy up every `every_s` seconds, until cancelled."""
        while True:
            await self.once()
            await anyio.sleep(self._every_s)

    async def once(self) -> None:
        """Remove what has expired and build every generation that is due, one at a time."""
        await self._sweep()
        while (due := self._store.take_crowded()) is not None:
            shelf, index = due
            await self._renew(shelf, index)
            await self._sweep()
        self._metrics.level(
            entries=len(self._store), size_bytes=self._store.size_bytes, encoder_ready=self._embedder.ready
        )

    async def save(self) -> None:
        """Write every graph that has no file yet: for the end of the process, it stalls the event loop."""
        files = self._library.files
        if files is None:
            return
        serving = {
            segment: shelf
            for shelf, index in self._store.indexes()
            for segment in index.segments
            if isinstance(segment, Graph)
        }

        def write() -> None:
            for graph, shelf in serving.items():
                files.save(shelf, graph)
            files.keep_only(set(serving))

        await to_thread.run_sync(write, limiter=self._building)

    async def _sweep(self) -> None:
        while expired := self._library.sweep(self._clock.now()):
            self._metrics.removed(len(expired), "expired")
            await anyio.lowlevel.checkpoint()

    async def _renew(self, shelf: Shelf, index: VectorIndex) -> None:
        rebuild = index.rebuild()
        began = self._clock.now()
        graph = await to_thread.run_sync(rebuild.build, limiter=self._building, abandon_on_cancel=True)
        failpoint.hit("semcache.swap")
        adopted = self._store.adopt(shelf, index, rebuild, graph)
        self._metrics.built(len(graph) if graph is not None else 0, self._clock.now() - began)
        spent = list(rebuild.sources)
        saved = graph if adopted and graph is not None and len(graph) <= SAVE_MAX else None
        del rebuild
        # What a graph held is freed in the thread too: for a large one that takes a while.
        await to_thread.run_sync(self._replace_files, shelf, saved, spent, limiter=self._building)

    def _replace_files(self, shelf: Shelf, graph: Graph | None, spent: list[Segment]) -> None:
        files = self._library.files
        if files is not None:
            if graph is not None:
                files.save(shelf, graph)
            for segment in spent:
                files.drop(segment)
        spent.clear()
        give_back_memory()
