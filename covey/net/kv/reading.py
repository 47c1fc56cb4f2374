"""The state of one load: how far its good prefix goes, and which layers of it have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from covey.errors import InvalidArgument
from covey.types.block import BlockShape
from covey.types.store import Ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Layers `first` up to, not including, `last`, `of` so many."""

    first: int
    last: int
    of: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def is_last(self) -> bool:
        """Whether none is left after these."""
        return self.last == self.of

    def within(self, shape: BlockShape) -> slice:
        """Return where they lie in a payload."""
        size = shape.size_bytes // self.of
        return slice(self.first * size, self.last * size)


class Reading:
    """Blocks that are read in passes: one over all layers, or one for each layer when somebody waits for layers.

    A transport fills `into` for each of `passes()` and calls `fail` for a block that is not good: the good prefix
    ends there, and later passes leave it out. `ready` is told of whole layers only, never after a failure.
    """

    def __init__(self, into: Sequence[memoryview], shapes: Sequence[BlockShape], ready: Ready | None = None) -> None:
        """`shapes` are those of the blocks as they are stored, and `into` has room for each."""
        self.into = into
        self.shapes = shapes
        self.good = len(into)
        """How many leading blocks are good so far."""
        self.fault = ""
        """What was wrong with the next one, if its node should be told."""
        self._ready = ready

    @property
    def by_layer(self) -> bool:
        """Whether the layers come one after another, each over all blocks."""
        return self._ready is not None

    @property
    def size_bytes(self) -> int:
        """Of all blocks."""
        return sum(shape.size_bytes for shape in self.shapes)

    def passes(self) -> Iterator[Layers]:
        """Yield what to read, in order; resuming means that it was read and verified."""
        layers = self.shapes[0].layers if self.shapes else 0
        step = 1 if self.by_layer else layers
        for first in range(0, layers, step):
            if not self.good:
                return
            yield Layers(first=first, last=first + step, of=layers)
            if self._ready is not None and self.good == len(self.into):
                self._ready(first + step)

    def fail(self, block: int, fault: str = "") -> None:
        """End the good prefix before a block."""
        if block < self.good:
            self.good, self.fault = block, fault

    def piece(self, block: int, layers: Layers) -> memoryview:
        """Return where some layers of a block go."""
        return self.into[block][layers.within(self.shapes[block])]


def layer_range(shape: BlockShape, first: int, last: int) -> Layers:
    """Return layers of a block. Raises `InvalidArgument` for some that there are not."""
    if not 0 <= first < last <= shape.layers:
        raise InvalidArgument(f"a block has {shape.layers} layers", field="last_layer")
    return Layers(first=first, last=last, of=shape.layers)
