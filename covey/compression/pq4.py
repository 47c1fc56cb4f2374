"""Product quantisation after MILLION: a byte for each pair of numbers, from codebooks trained offline."""

from __future__ import annotations

import numpy as np

from covey.compression.codebook import CODES, PAIR, Codebook, nearest, pages_of, pairs_of
from covey.compression.pages import Bytes, Floats, Pages
from covey.errors import LayoutMismatch
from covey.types.block import BlockCodec, BlockShape

_ID = np.dtype("<u8")


class Pq4:
    """4 bits a number and the codebook's id in each layer. Encoding searches 256 centroids for each pair: off any
    critical path; decoding is a look-up.
    """

    name = BlockCodec.PQ4

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self._centroids: Floats = codebook.centroids.astype(np.float32)

    def layer_bytes(self, shape: BlockShape) -> int:
        """See `Codec.layer_bytes`."""
        self._check(shape)
        return _ID.itemsize + 2 * shape.kv_heads * shape.head_dim * shape.tokens // PAIR

    def pack(self, pages: Pages) -> Bytes:
        """See `Codec.pack`."""
        pairs = pairs_of(pages)
        points = pairs.reshape(-1, *pairs.shape[4:])
        codes = nearest(points, self._centroids.reshape(-1, CODES, PAIR)).reshape(len(pairs), -1)
        ids = np.full((len(pairs), 1), self.codebook.id, dtype=_ID)
        return np.concatenate((ids.view(np.uint8), codes), axis=1)

    def unpack(self, data: Bytes, shape: BlockShape, first_layer: int) -> Pages:
        """See `Codec.unpack`."""
        self._check(shape)
        ids = np.ascontiguousarray(data[:, : _ID.itemsize]).view(_ID)
        if (ids != self.codebook.id).any():
            raise LayoutMismatch("this block was encoded with another codebook", field="codec")
        spaces = (len(data), 2, shape.kv_heads, shape.head_dim // PAIR)
        codes = data[:, _ID.itemsize :].reshape(-1, shape.tokens)
        table = self._centroids[first_layer : first_layer + len(data)].reshape(-1, PAIR)
        at = codes + CODES * np.arange(len(codes), dtype=np.int32)[:, None]
        pairs = table.view(np.uint64).reshape(-1)[at].view(np.float32)
        return pages_of(pairs.reshape(*spaces, shape.tokens, PAIR))

    def _check(self, shape: BlockShape) -> None:
        if not self.codebook.fits(shape):
            raise LayoutMismatch("the codebook is for blocks of another model", field="shape")
