"""A load that may take more than one node: what of it is good so far, and where the rest goes."""

from __future__ import annotations

from collections.abc import Sequence

from covey.net.kv.held import StoreHeld
from covey.types.ids import BlockHash
from covey.types.store import Ready


class Partial:
    """The blocks of `held`, to be put into `into`. Take `hashes`, fill `buffers`, then say with `add` what is good.

    Layers that the caller was told of may be in use: they are never written again, so that the rest of their
    blocks comes by way of scratch memory, after it was verified.
    """

    def __init__(self, held: StoreHeld, into: Sequence[memoryview], ready: Ready | None) -> None:
        self.good = 0
        self._key = held.key
        self._names = held.hashes[: len(into)]
        self._into = into
        self._ready = ready
        self._told = 0

    @property
    def is_whole(self) -> bool:
        return self.good == len(self._into)

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The blocks that are missing."""
        return self._names[self.good :]

    def ready(self, count: int) -> Ready | None:
        """Return whom to tell of whole layers of the next `count` blocks.

        Nobody while others are missing after them, or the rest takes the way by scratch memory.
        """
        is_last = self.good + count >= len(self._into)
        return self._tell if self._ready is not None and is_last and not self._told else None

    def buffers(self, count: int) -> list[memoryview]:
        """Return where the next `count` blocks go."""
        if self._told:
            return [memoryview(bytearray(self._key.shape.size_bytes)) for _ in range(count)]
        return list(self._into[self.good : self.good + count])

    def add(self, buffers: Sequence[memoryview], good: int) -> None:
        """Take over the first `good` of what `buffers` gave out."""
        layers = self._key.shape.layers
        start = self._told * (self._key.shape.size_bytes // layers)
        for target, source in zip(self._into[self.good :], buffers[:good], strict=False):
            if target is not source:
                target[start:] = source[start:]
        self.good += good
        if self.is_whole and self._ready is not None and self._told < layers:
            self._tell(layers)

    def _tell(self, layers: int) -> None:
        self._told = layers
        if self._ready is not None:
            self._ready(layers)
