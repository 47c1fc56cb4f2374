"""Evenly spaced levels: each group of numbers keeps its lowest value and its step in half precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covey.compression.pages import Bytes, Floats
from covey.errors import DataCorrupt, InvalidArgument

GRID_BYTES = 4
"""Lowest value and step of a group."""


def grid_bytes(groups: int, size: int, bits: int = 8) -> int:
    """What `to_grid` makes of `groups` groups of `size` numbers."""
    return groups * (GRID_BYTES + size * bits // 8)


def to_grid(numbers: Floats, bits: int = 8) -> Bytes:
    """Encode [row, …, group]: [row, bytes]. The error is at most half a step, the group's span over its levels.

    `bits` is 2, 4 or 8 and fills whole bytes. Raises `InvalidArgument` for numbers beyond half precision.
    """
    top = np.float32((1 << bits) - 1)
    low = _half(numbers.min(axis=-1), -np.inf)
    with np.errstate(over="ignore"):
        span = numbers.max(axis=-1) - low.astype(np.float32)
    step = _half(span / top, np.inf)
    grid = np.stack((low, step), axis=-1)
    if not np.isfinite(grid).all():
        raise InvalidArgument("these numbers are too large to be quantised", field="payload")
    wide = step.astype(np.float32)
    inverse = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide > 0)
    levels = (numbers - low.astype(np.float32)[..., None]) * inverse[..., None]
    np.rint(levels, out=levels)
    np.clip(levels, 0, top, out=levels)
    rows = len(numbers)
    packed = _packed(levels.astype(np.uint8).reshape(rows, -1), bits)
    return np.concatenate((grid.reshape(rows, -1).view(np.uint8), packed), axis=1)


def from_grid(data: Bytes, shape: tuple[int, ...], bits: int = 8) -> Floats:
    """Decode [row, bytes] into [row, *shape], whose last axis is a group. Raises `DataCorrupt`."""
    middle = int(np.prod(shape[:-1])) * GRID_BYTES
    grid = np.ascontiguousarray(data[:, :middle]).view("<f2").astype(np.float32).reshape(len(data), *shape[:-1], 2)
    if not np.isfinite(grid).all() or (grid[..., 1] < 0).any():
        raise DataCorrupt("an encoded block holds a step that no block has")
    levels = _unpacked(data[:, middle:], bits).reshape(len(data), *shape).astype(np.float32)
    levels *= grid[..., 1:]
    levels += grid[..., :1]
    return levels


def _packed(levels: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return levels
    parts = levels.reshape(len(levels), -1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=2)
    return packed


def _unpacked(data: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (data[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)


def _half(numbers: Floats, towards: float) -> NDArray[np.float16]:
    """Half precision, rounded towards minus or plus infinity."""
    with np.errstate(over="ignore"):
        near = numbers.astype("<f2")
        wide = near.astype(np.float32)
        wrong = wide > numbers if towards < 0 else wide < numbers
        return np.where(wrong, np.nextafter(near, np.float16(towards)), near)
