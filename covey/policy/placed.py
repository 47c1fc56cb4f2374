"""A block's slot and geometry, as the rows of a shelf say it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from covey.policy.arena import PAGE_BYTES
from covey.policy.block_columns import BlockColumns, Rows
from covey.policy.shelf import CODECS, RAW, Shelf
from covey.types.block import BlockCodec, BlockLocation, BlockLocations, BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A block's slot and geometry."""

    namespace: NamespaceId
    location: BlockLocation
    shape: BlockShape
    """As it lies in the slot: of an encoded payload, `size_bytes` is the encoded size."""
    parent: BlockHash = BlockHash(b"")
    tenant: TenantId = TenantId("")
    codec: BlockCodec = BlockCodec.RAW


def placed(shelf: Shelf, row: int) -> Placed:
    """Say where one block is."""
    columns, space = shelf.columns, shelf.space_of(row)
    codec = CODECS[columns.at_codec[row]]
    size_bytes = columns.at_size_bytes[row]
    parent = columns.at_parent[row]
    location = BlockLocation(
        hash=columns.name(row),
        offset=columns.offset(row),
        generation=columns.at_generation[row],
        digest=columns.at_digest[row],
        codec=codec,
        size_bytes=0 if codec is BlockCodec.RAW else size_bytes,
    )
    return Placed(
        namespace=space.namespace,
        location=location,
        shape=space.shape if size_bytes == space.shape.size_bytes else replace(space.shape, size_bytes=size_bytes),
        parent=columns.name(parent) if parent >= 0 else BlockHash(b""),
        tenant=shelf.tenants[columns.at_tenant[row]].tenant,
        codec=codec,
    )


def located(columns: BlockColumns, rows: Rows, keys: NDArray[np.uint64]) -> BlockLocations:
    """Say where many blocks are, as columns; `keys` begin with theirs."""
    codecs = columns.codec.take(rows)
    encoded: dict[str, bytes] = {}
    if codecs.any():
        sizes = np.where(codecs == RAW, 0, columns.size_bytes[rows])
        encoded = {"codecs": (codecs + 1).tobytes(), "sizes": sizes.astype("<u8").tobytes()}
    return BlockLocations(
        hashes=keys[: len(rows)].tobytes(),
        offsets=(columns.page.take(rows).astype("<u8") * PAGE_BYTES).tobytes(),
        generations=columns.generation.take(rows).astype("<u8", copy=False).tobytes(),
        digests=columns.digest.take(rows).astype("<u8", copy=False).tobytes(),
        **encoded,
    )
