"""Eight bits a number: keys by channel, values by token, each group with its own lowest value and step (KIVI)."""

from __future__ import annotations

import numpy as np

from covey.compression.grid import from_grid, grid_bytes, to_grid
from covey.compression.pages import Bytes, Pages
from covey.types.block import BlockCodec, BlockShape


class Int8:
    """A channel of keys over a block's tokens is a group, and so is a token's values of one head.

    The error is at most half a step, which is a 255th of the group's span, rounded up to half precision.
    """

    name = BlockCodec.INT8

    def layer_bytes(self, shape: BlockShape) -> int:
        """See `Codec.layer_bytes`."""
        keys = grid_bytes(shape.kv_heads * shape.head_dim, shape.tokens)
        return keys + grid_bytes(shape.kv_heads * shape.tokens, shape.head_dim)

    def pack(self, pages: Pages) -> Bytes:
        """See `Codec.pack`."""
        return np.concatenate((to_grid(pages.keys), to_grid(pages.values)), axis=1)

    def unpack(self, data: Bytes, shape: BlockShape, first_layer: int) -> Pages:
        """See `Codec.unpack`."""
        heads, width, tokens = shape.kv_heads, shape.head_dim, shape.tokens
        middle = grid_bytes(heads * width, tokens)
        return Pages(
            keys=from_grid(data[:, :middle], (heads, width, tokens)),
            values=from_grid(data[:, middle:], (heads, tokens, width)),
        )
