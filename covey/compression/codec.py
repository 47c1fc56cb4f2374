"""What every codec is, and blocks through one: sizes follow from the shape, layers stay apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from covey.compression.pages import Bytes, Pages, page_bytes, raw_bytes, read_pages, write_pages
from covey.errors import DataCorrupt, InvalidArgument
from covey.types.block import BlockCodec, BlockShape


class Codec(Protocol):
    """Turns layers into bytes and back. All layers of a shape take the same number of bytes, known in advance."""

    @property
    def name(self) -> BlockCodec:
        """What a block's header says."""
        ...

    def layer_bytes(self, shape: BlockShape) -> int:
        """A layer as it is encoded. Raises `LayoutMismatch` for a shape that this codec does not take."""
        ...

    def pack(self, pages: Pages) -> Bytes:
        """Encode all layers of a block: [layer, layer_bytes]. Raises `InvalidArgument` for numbers out of range."""
        ...

    def unpack(self, data: Bytes, shape: BlockShape, first_layer: int) -> Pages:
        """Decode [layer, layer_bytes], the layers from `first_layer` on. Raises `DataCorrupt` and `LayoutMismatch`."""
        ...


def encoded(codec: Codec, shape: BlockShape) -> BlockShape:
    """The shape of a block of `shape` once it is encoded. Raises `LayoutMismatch` when the codec does not take it."""
    page_bytes(shape)
    return replace(shape, size_bytes=codec.layer_bytes(shape) * shape.layers)


def raw(shape: BlockShape) -> BlockShape:
    """The shape of an encoded block before it was encoded. Raises `LayoutMismatch`."""
    return replace(shape, size_bytes=raw_bytes(shape))


def encode(codec: Codec, payload: bytes | memoryview, shape: BlockShape) -> bytes:
    """A raw payload as it is stored.

    Raises:
        InvalidArgument: a wrong size, NaN, infinity, or numbers out of the codec's range.
        LayoutMismatch: the codec does not take this shape.
    """
    codec.layer_bytes(shape)
    return codec.pack(read_pages(payload, shape)).tobytes()


def decode(
    codec: Codec,
    data: bytes | memoryview,
    shape: BlockShape,
    into: memoryview,
    *,
    first_layer: int = 0,
    last_layer: int = 0,
) -> None:
    """Write layers `first_layer` to `last_layer` (0: to the end) of an encoded block into a raw payload.

    `data` holds these layers only, `into` is the whole payload; its other layers stay as they are.

    Raises:
        DataCorrupt: `data` is not what the codec makes.
        LayoutMismatch: encoded with another codebook, or a shape that the codec does not take.
        InvalidArgument: no such layers, or `into` has another size.
    """
    last = last_layer or shape.layers
    if not 0 <= first_layer < last <= shape.layers:
        raise InvalidArgument(f"a block has {shape.layers} layers", field="last_layer")
    found = np.frombuffer(data, dtype=np.uint8)
    size = codec.layer_bytes(shape)
    if found.nbytes != size * (last - first_layer):
        raise DataCorrupt(f"{last - first_layer} encoded layers have {size} bytes each, not {found.nbytes} together")
    write_pages(codec.unpack(found.reshape(-1, size), shape, first_layer), raw(shape), first_layer, into)
