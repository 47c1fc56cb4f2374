"""Encoded blocks on their way to a reader: read into scratch memory, verified as they are stored, then decoded."""

from __future__ import annotations

from collections.abc import Sequence

from covey.compression import Codecs, decode
from covey.errors import DataCorrupt, LayoutMismatch
from covey.net.kv.reading import Reading
from covey.types.block import BlockCodec, BlockLocation, BlockLocations, BlockShape


class Decoding:
    """Blocks at `locations`, to be put into `into` as engines have them."""

    def __init__(
        self, codecs: Codecs, shape: BlockShape, locations: Sequence[BlockLocation], into: Sequence[memoryview]
    ) -> None:
        """`shape` is that of a block that is not encoded."""
        self._codecs = codecs
        self._shape = shape
        self._into = into
        is_plain = isinstance(locations, BlockLocations) and not locations.codecs  # a look-up's columns tell at once
        self.is_needed = not is_plain and any(location.codec is not BlockCodec.RAW for location in locations)
        """Whether any block is encoded: the layers of such a load are not told of one by one."""
        self._names = [location.codec for location in locations] if self.is_needed else []
        self.buffers = list(into)
        """Where to read the blocks as they are stored."""
        for i, name in enumerate(self._names):
            if name is not BlockCodec.RAW:
                self.buffers[i] = memoryview(bytearray(locations[i].size_bytes))

    def run(self, reading: Reading) -> None:
        """Decode what is good of a load into `buffers`; a block that cannot be decoded ends the good prefix.

        One of a codebook that is not here is no fault of the block.
        """
        for i, name in enumerate(self._names):
            if i >= reading.good:
                return
            if name is BlockCodec.RAW:
                continue
            try:
                decode(self._codecs.find(name), self.buffers[i], self._shape, self._into[i])
            except DataCorrupt as error:
                reading.fail(i, error.message)
            except LayoutMismatch:
                reading.fail(i)
