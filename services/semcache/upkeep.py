"""The upkeep of the tables: expiry, new index generations in the background, and the levels in the metrics."""

from __future__ import annotations

import anyio
from anyio import to_thread

from covey.clock import Clock

from .encoder import Embedder
from .metrics import CacheMetrics
from .store import Store


class Upkeep:
    """One task that keeps the tables tidy; look-ups never wait for it."""

    def __init__(
        self, store: Store, embedder: Embedder, metrics: CacheMetrics, clock: Clock, *, every_s: float
    ) -> None:
        self._store = store
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
        while removed := self._store.sweep(self._clock.now()):
            self._metrics.removed(removed, "expired")
            await anyio.lowlevel.checkpoint()
        while (index := self._store.take_crowded()) is not None:
            rebuild = index.rebuild()
            generation = await to_thread.run_sync(rebuild.build, limiter=self._building, abandon_on_cancel=True)
            index.adopt(rebuild, generation)
        self._metrics.level(
            entries=len(self._store), size_bytes=self._store.size_bytes, encoder_ready=self._embedder.ready
        )
