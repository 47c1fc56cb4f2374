"""Copies of blocks with their checksums: a layer at a time, so that it is hashed while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from covey.types.block import BlockShape

RELEASED_BYTES = 32 * 1024
"""Copies of at least so many bytes let other threads run; for less that costs more than it gives."""


def digest(header: bytes) -> int:
    """Return the one number that the index keeps of a header."""
    value: int = xxhash.xxh3_64_intdigest(header)
    return value


def checksums(payload: memoryview, shape: BlockShape) -> tuple[int, ...]:
    """Return xxh3-64 of each layer."""
    return layer_sums(payload, shape.layers)


def layer_sums(data: memoryview, layers: int) -> tuple[int, ...]:
    """Return xxh3-64 of each of the layers of one size that `data` holds."""
    size = data.nbytes // layers
    return tuple(xxhash.xxh3_64_intdigest(data[at : at + size]) for at in range(0, data.nbytes, size))


def copy_in(slot: memoryview, source: memoryview, shape: BlockShape) -> tuple[int, ...]:
    """Copy a block into its slot's payload; return the checksums of what was copied."""
    size = shape.size_bytes // shape.layers
    sums = []
    for at in range(0, shape.size_bytes, size):
        layer = slot[at : at + size]
        copy(layer, source[at : at + size])
        # Of the copy: what a caller's buffer becomes meanwhile must not be what the store vouches for.
        sums.append(xxhash.xxh3_64_intdigest(layer))
    return tuple(sums)


def copy_out(slot: memoryview, into: memoryview, sums: Sequence[int]) -> bool:
    """Copy layers out of a slot; return whether the copy, not the slot, has the checksums."""
    size = into.nbytes // len(sums)
    for at, expected in zip(range(0, into.nbytes, size), sums, strict=True):
        layer = into[at : at + size]
        copy(layer, slot[at : at + size])
        if xxhash.xxh3_64_intdigest(layer) != expected:
            return False
    return True


def copy(into: memoryview, source: memoryview) -> None:
    """Copy bytes between buffers of one size."""
    if into.nbytes < RELEASED_BYTES:
        into[:] = source
    else:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
