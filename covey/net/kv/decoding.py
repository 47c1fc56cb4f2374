"""Encoded blocks on their way to a reader: read into scratch memory, verified as they are stored, then decoded."""

from __future__ import annotations

from collections.abc import Sequence

from covey.compression import Codecs, decode
from covey.errors import DataCorrupt, LayoutMismatch
from covey.net.kv.reading import Reading
from covey.types.kv import BlockCodec, BlockLocation, BlockShape


class Decoding:
    """Blocks at `locations`, to be put into `into` as engines have them."""

    def __init__(
        self, codecs: Codecs, shape: BlockShape, locations: Sequence[BlockLocation], into: Sequence[memoryview]
    ) -> None:
        """`shape` is that of a block that is not encoded."""
        self._codecs = codecs
        self._shape = shape
        self._into = into
        self._names = [location.codec for location in locations]
        self.is_needed = any(name is not BlockCodec.RAW for name in self._names)
        """Whether any block is encoded: the layers of such a load are not told of one by one."""
        self.buffers = [
            view if location.codec is BlockCodec.RAW else memoryview(bytearray(location.size_bytes))
            for view, location in zip(into, locations, strict=True)
        ]
        """Where to read the blocks as they are stored."""

    def run(self, reading: Reading) -> None:
        """Decode what is good of a load into `buffers`; a block that cannot be decoded ends the good prefix.

        One of a codebook that is not here is no fault of the block.
        """
        for i, (name, data) in enumerate(zip(self._names, self.buffers, strict=True)):
            if i >= reading.good:
                return
            if name is BlockCodec.RAW:
                continue
            try:
                decode(self._codecs.find(name), data, self._shape, self._into[i])
            except DataCorrupt as error:
                reading.fail(i, error.message)
            except LayoutMismatch:
                reading.fail(i)
