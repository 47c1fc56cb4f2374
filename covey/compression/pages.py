"""The numbers of a block's payload, and back: pages of keys and values in whatever type an engine keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covey.errors import DataCorrupt, InvalidArgument, LayoutMismatch
from covey.types.block import BlockShape, KvElement

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_TYPES: dict[KvElement, np.dtype[Any]] = {
    KvElement.FP32: np.dtype("<f4"),
    KvElement.FP16: np.dtype("<f2"),
    KvElement.INT8: np.dtype("i1"),
}
_SCALE_BYTES = 4
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Some layers of a block: `keys` [layer, head, head_dim, token] and `values` [layer, head, token, head_dim]."""

    keys: Floats
    values: Floats

    def of(self, layer: int) -> Pages:
        """One of these layers."""
        return Pages(keys=self.keys[layer : layer + 1], values=self.values[layer : layer + 1])


def page_bytes(shape: BlockShape) -> int:
    """One head's keys or values of one layer. Raises `LayoutMismatch` for a shape whose numbers are not known."""
    if shape.element not in _TYPES or not (shape.kv_heads and shape.head_dim and shape.tokens):
        raise LayoutMismatch("only blocks whose element type and geometry are named can be encoded", field="shape")
    scales = _SCALE_BYTES * shape.tokens if shape.element is KvElement.INT8 else 0
    return shape.head_dim * shape.tokens * _TYPES[shape.element].itemsize + scales


def raw_bytes(shape: BlockShape) -> int:
    """A block's payload before it is encoded. Raises `LayoutMismatch` as `page_bytes` does."""
    return page_bytes(shape) * 2 * shape.kv_heads * shape.layers


def read_pages(payload: bytes | memoryview, shape: BlockShape) -> Pages:
    """The numbers of a raw payload. Raises `InvalidArgument` for a wrong size, NaN or infinity; `LayoutMismatch`."""
    pages = _pages(payload, shape)
    width = shape.head_dim * shape.tokens * _TYPES[shape.element].itemsize
    numbers = pages[..., :width].view(_TYPES[shape.element]).astype(np.float32)
    keys, values = _shaped(numbers, shape)
    if shape.element is KvElement.INT8:
        scales = np.ascontiguousarray(pages[..., width:]).view("<f4")
        keys = keys * scales[:, 0, :, None, :]
        values = values * scales[:, 1, :, :, None]
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        raise InvalidArgument("a block with NaN or infinity is never stored in another form", field="payload")
    return Pages(keys=keys, values=values)


def write_pages(found: Pages, shape: BlockShape, first_layer: int, into: memoryview) -> None:
    """Put layers, from `first_layer` on, into a raw payload.

    Raises:
        DataCorrupt: the numbers are not finite, or too large for the payload's type.
        InvalidArgument: `into` has another size.
    """
    pages = _pages(into, shape)[first_layer : first_layer + len(found.keys)]
    dtype = _TYPES[shape.element]
    width = shape.head_dim * shape.tokens * dtype.itemsize
    for kind, given in enumerate((found.keys, found.values)):
        numbers, largest = given, float(np.abs(given).max(initial=0.0))
        if not largest <= (_HALF_MAX if shape.element is KvElement.FP16 else np.finfo(np.float32).max):
            raise DataCorrupt("an encoded block holds numbers that it cannot have had")
        if shape.element is KvElement.INT8:
            scales = np.abs(given).max(axis=2 if kind == 0 else 3) / np.float32(127.0)
            inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
            spread = inverse[:, :, None, :] if kind == 0 else inverse[..., None]
            numbers = np.rint(given * spread)
            pages[:, kind, :, width:] = scales.astype("<f4")[..., None].view(np.uint8).reshape(*scales.shape[:2], -1)
        flat = numbers.reshape(*numbers.shape[:2], -1)
        pages[:, kind, :, :width].view(dtype)[...] = flat


def _pages(payload: bytes | memoryview, shape: BlockShape) -> Bytes:
    size = raw_bytes(shape)
    data = np.frombuffer(payload, dtype=np.uint8)
    if data.nbytes != size:
        raise InvalidArgument(f"a payload of this shape has {size} bytes, this has {data.nbytes}", field="payload")
    return data.reshape(shape.layers, 2, shape.kv_heads, -1)


def _shaped(numbers: Floats, shape: BlockShape) -> tuple[Floats, Floats]:
    head = numbers.shape[:1] + numbers.shape[2:3]
    keys = numbers[:, 0].reshape(*head, shape.head_dim, shape.tokens)
    return keys, numbers[:, 1].reshape(*head, shape.tokens, shape.head_dim)
