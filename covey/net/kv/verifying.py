"""What makes blocks from a network good: their header is the one that the index vouches for, their layers fit it."""

from __future__ import annotations

from covey.net.kv.copying import digest, layer_sums
from covey.net.kv.held import StoreHeld
from covey.net.kv.mapping import rebuilt_header
from covey.net.kv.reading import Layers, Reading

BAD_LAYER = "a layer does not have its checksum"


class Verifier:
    """Checks what has come of each block. May be used from a worker's thread, by one at a time."""

    def __init__(self, held: StoreHeld, reading: Reading) -> None:
        self.complete = 0
        """Leading blocks of which all layers have come."""
        self._held = held
        self._reading = reading
        self._sums: list[tuple[int, ...]] = []

    def knows(self, block: int) -> bool:
        """Whether the checksums of a block have come."""
        return block < len(self._sums)

    def note(self, sums: tuple[int, ...]) -> None:
        """Take the checksums of the next block."""
        self._sums.append(sums)

    def settle(self, block: int, layers: Layers) -> bool:
        """Return whether some layers, now in their buffer, are good; else the good prefix ends. Raises `LeaseExpired`.

        An ended lease proves nothing about the block: it is looked at before a block is called bad.
        """
        reading = self._reading
        if block >= reading.good:
            return False
        if not self._is_good(block, layers):
            self._held.check()
            reading.fail(block, BAD_LAYER)
            return False
        if layers.is_last:
            self.complete = block + 1
        return True

    def _is_good(self, block: int, layers: Layers) -> bool:
        sums, location, shape = self._sums[block], self._held.locations[block], self._reading.shapes[block]
        if layers.first == 0:
            if len(sums) != shape.layers:
                return False
            if digest(rebuilt_header(location, self._held.key.namespace, shape, sums)) != location.digest:
                return False
        found = layer_sums(self._reading.piece(block, layers), layers.count)
        return found == sums[layers.first : layers.last]
