"""The state of one load: how far its good prefix goes, and which layers of it have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from covey.errors import InvalidArgument
from covey.types.kv import BlockShape
from covey.types.store import Ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Layers `first` up to, not including, `last`, and the bytes that they take in a payload."""

    first: int
    last: int
    start: int
    end: int


class Reading:
    """Blocks that are read in passes: one over all layers, or one for each layer when somebody waits for layers.

    A transport fills `into` for each of `passes()` and calls `fail` for a block that is not good: the good prefix
    ends there, and later passes leave it out. `ready` is told of whole layers only, never after a failure.
    """

    def __init__(self, into: Sequence[memoryview], shape: BlockShape, ready: Ready | None = None) -> None:
        self.into = into
        self.shape = shape
        self.good = len(into)
        """How many leading blocks are good so far."""
        self.fault = ""
        """What was wrong with the next one, if its node should be told."""
        self._ready = ready

    @property
    def by_layer(self) -> bool:
        """Whether the layers come one after another, each over all blocks."""
        return self._ready is not None

    def passes(self) -> Iterator[Layers]:
        """Yield what to read, in order; resuming means that it was read and verified."""
        step = 1 if self.by_layer else self.shape.layers
        for first in range(0, self.shape.layers, step):
            if not self.good:
                return
            last = first + step
            yield layer_range(self.shape, first, last)
            if self._ready is not None and self.good == len(self.into):
                self._ready(last)

    def fail(self, block: int, fault: str = "") -> None:
        """End the good prefix before a block."""
        if block < self.good:
            self.good, self.fault = block, fault

    def piece(self, block: int, layers: Layers) -> memoryview:
        """Return where some layers of a block go."""
        return self.into[block][layers.start : layers.end]


def layer_range(shape: BlockShape, first: int, last: int) -> Layers:
    """Return where layers lie in a payload. Raises `InvalidArgument` for layers that there are not."""
    if not 0 <= first < last <= shape.layers:
        raise InvalidArgument(f"a block has {shape.layers} layers", field="last_layer")
    size = shape.size_bytes // shape.layers
    return Layers(first=first, last=last, start=first * size, end=last * size)
