"""Keys and values in half precision."""

from __future__ import annotations

import numpy as np

from covey.compression.pages import Bytes, Pages
from covey.errors import DataCorrupt, InvalidArgument
from covey.types.block import BlockCodec, BlockShape


class Fp16:
    """2 bytes a number: relative error up to 2⁻¹¹, numbers up to 65504."""

    name = BlockCodec.FP16

    def layer_bytes(self, shape: BlockShape) -> int:
        """See `Codec.layer_bytes`."""
        return 4 * shape.kv_heads * shape.head_dim * shape.tokens

    def pack(self, pages: Pages) -> Bytes:
        """See `Codec.pack`."""
        layers = len(pages.keys)
        out = np.empty((layers, 2, pages.keys[0].size), dtype="<f2")
        with np.errstate(over="ignore"):
            out[:, 0] = pages.keys.reshape(layers, -1)
            out[:, 1] = pages.values.reshape(layers, -1)
        if not np.isfinite(out).all():
            raise InvalidArgument("numbers over 65504 do not fit into half precision", field="payload")
        return out.reshape(layers, -1).view(np.uint8)

    def unpack(self, data: Bytes, shape: BlockShape, first_layer: int) -> Pages:
        """See `Codec.unpack`."""
        numbers = data.view("<f2").astype(np.float32).reshape(len(data), 2, -1)
        if not np.isfinite(numbers).all():
            raise DataCorrupt("an encoded block holds NaN or infinity")
        heads, width, tokens = shape.kv_heads, shape.head_dim, shape.tokens
        return Pages(
            keys=numbers[:, 0].reshape(-1, heads, width, tokens), values=numbers[:, 1].reshape(-1, heads, tokens, width)
        )
