"""A store whose layers come in bursts, late, damaged or not at all, over buffers that hold rubbish until they do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import anyio

from covey.errors import LeaseExpired
from covey.types.store import Held, Ready
from tests.support.engines import Shelf

RUBBISH = 0xFF


class Bursts(Shelf):
    """Layers arrive a few at a time with turns of the event loop in between; `damage` is how often a load breaks off:
    with a bad block, or with its lease.
    """

    def __init__(self, seed: int, *, layers: int, damage: float = 0.0, turns_max: int = 40) -> None:
        super().__init__()
        self._rng = Random(seed)
        self._layers = layers
        self._damage = damage
        self._turns_max = turns_max
        self.loads = 0
        """Loads that came layer by layer."""
        self.broken = 0
        """Of those, the ones that broke off."""

    async def load(self, held: Held, into: Sequence[memoryview], *, ready: Ready | None = None) -> int:
        """As the contract says; see `covey.types.store.BlockStore.load`."""
        if ready is None:
            return await super().load(held, into)
        self.loads += 1
        copies = [memoryview(bytearray(view.nbytes)) for view in into]
        good = await super().load(held, copies)
        for view in into:
            view.cast("B")[:] = bytes([RUBBISH]) * view.nbytes
        breaks_at = self._rng.randrange(self._layers) if self._rng.random() < self._damage else self._layers
        done = 0
        while done < self._layers:
            await self._wait()
            end = min(self._layers, done + self._rng.choice((1, 1, 1, 2, 3, self._layers)))
            if end > breaks_at:
                self.broken += 1
                return await self._break_off(into, copies, good, done)
            self._copy(into[:good], copies, done, end)
            done = end
            if good == len(into):
                ready(done)
        await self._wait()
        return good

    async def _break_off(self, into: Sequence[memoryview], copies: Sequence[memoryview], good: int, done: int) -> int:
        """A block is bad: the ones before it are completed; or the lease has ended, and nothing of it counts."""
        if self._rng.random() < 0.3:
            raise LeaseExpired("the lease on these blocks has ended", field="lease")
        good = self._rng.randrange(good) if good else 0
        self._copy(into[:good], copies, done, self._layers)
        await self._wait()
        return good

    def _copy(self, into: Sequence[memoryview], copies: Sequence[memoryview], first: int, last: int) -> None:
        for view, copy in zip(into, copies, strict=False):
            size = view.nbytes // self._layers
            view.cast("B")[first * size : last * size] = copy[first * size : last * size]

    async def _wait(self) -> None:
        for _ in range(self._rng.randrange(self._turns_max)):
            await anyio.lowlevel.checkpoint()
