"""Eight bits a number: keys by channel, values by token, each group with its own lowest value and step (KIVI)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covey.compression.pages import Bytes, Floats, Pages
from covey.errors import DataCorrupt, InvalidArgument
from covey.types.kv import BlockCodec, BlockShape

_LEVELS = np.float32(255.0)
_GROUP_BYTES = 4
"""Lowest value and step of a group, in half precision."""


class Int8:
    """A channel of keys over a block's tokens is a group, and so is a token's values of one head.

    The error is at most half a step, which is a 255th of the group's span, rounded up to half precision.
    """

    name = BlockCodec.INT8

    def layer_bytes(self, shape: BlockShape) -> int:
        """See `Codec.layer_bytes`."""
        numbers = shape.head_dim * shape.tokens
        return shape.kv_heads * (2 * numbers + _GROUP_BYTES * (shape.head_dim + shape.tokens))

    def pack(self, pages: Pages) -> Bytes:
        """See `Codec.pack`."""
        parts = [part for numbers in (pages.keys, pages.values) for part in _quantise(numbers)]
        return np.concatenate([part.reshape(len(part), -1).view(np.uint8) for part in parts], axis=1)

    def unpack(self, data: Bytes, shape: BlockShape, first_layer: int) -> Pages:
        """See `Codec.unpack`."""
        heads, width, tokens = shape.kv_heads, shape.head_dim, shape.tokens
        middle = heads * (width * tokens + _GROUP_BYTES * width)
        return Pages(
            keys=_restore(data[:, :middle], (heads, width, tokens)),
            values=_restore(data[:, middle:], (heads, tokens, width)),
        )


def _quantise(numbers: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """Groups along the last axis: ([…, 2] lowest and step, […, n] levels)."""
    low = _half(numbers.min(axis=-1), -np.inf)
    with np.errstate(over="ignore"):
        span = numbers.max(axis=-1) - low.astype(np.float32)
    step = _half(span / _LEVELS, np.inf)
    grid = np.stack((low, step), axis=-1)
    if not np.isfinite(grid).all():
        raise InvalidArgument("the numbers of this block are too large for eight bits", field="payload")
    wide = step.astype(np.float32)
    inverse = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide > 0)
    levels = (numbers - low.astype(np.float32)[..., None]) * inverse[..., None]
    np.rint(levels, out=levels)
    np.clip(levels, 0, _LEVELS, out=levels)
    return grid, levels.astype(np.uint8)


def _restore(data: Bytes, page: tuple[int, int, int]) -> Floats:
    heads, groups, size = page
    grid_bytes = heads * groups * _GROUP_BYTES
    grid = np.ascontiguousarray(data[:, :grid_bytes]).view("<f2").astype(np.float32).reshape(-1, heads, groups, 2)
    if not np.isfinite(grid).all() or (grid[..., 1] < 0).any():
        raise DataCorrupt("an encoded block holds a step that no block has")
    levels = data[:, grid_bytes:].reshape(-1, heads, groups, size).astype(np.float32)
    levels *= grid[..., 1:]
    levels += grid[..., :1]
    return levels


def _half(numbers: Floats, towards: float) -> NDArray[np.float16]:
    """Half precision, rounded towards minus or plus infinity."""
    with np.errstate(over="ignore"):
        near = numbers.astype("<f2")
        wide = near.astype(np.float32)
        wrong = wide > numbers if towards < 0 else wide < numbers
        return np.where(wrong, np.nextafter(near, np.float16(towards)), near)
