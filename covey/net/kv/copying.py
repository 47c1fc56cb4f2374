"""Copies of blocks with their checksums: a layer at a time, so that it is hashed while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from covey.types.kv import BlockShape


def digest(header: bytes) -> int:
    """Return the one number that the index keeps of a header."""
    value: int = xxhash.xxh3_64_intdigest(header)
    return value


def checksums(payload: memoryview, shape: BlockShape) -> tuple[int, ...]:
    """Return xxh3-64 of each layer."""
    size = shape.size_bytes // shape.layers
    return tuple(xxhash.xxh3_64_intdigest(payload[at : at + size]) for at in range(0, shape.size_bytes, size))


def copy_in(slot: memoryview, source: memoryview, shape: BlockShape) -> tuple[int, ...]:
    """Copy a block into its slot's payload; return the checksums of what was copied."""
    size = shape.size_bytes // shape.layers
    sums = []
    for at in range(0, shape.size_bytes, size):
        layer = source[at : at + size]
        slot[at : at + size] = layer
        sums.append(xxhash.xxh3_64_intdigest(layer))
    return tuple(sums)


def copy_out(slot: memoryview, into: memoryview, shape: BlockShape, sums: Sequence[int]) -> bool:
    """Copy a block out of its slot; return whether the copy, not the slot, has the checksums."""
    size = shape.size_bytes // shape.layers
    for at, expected in zip(range(0, shape.size_bytes, size), sums, strict=True):
        layer = into[at : at + size]
        layer[:] = slot[at : at + size]
        if xxhash.xxh3_64_intdigest(layer) != expected:
            return False
    return True
