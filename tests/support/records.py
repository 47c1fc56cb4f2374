"""Records of the tiers, made of random bytes."""

from __future__ import annotations

import os

import xxhash

from covey.policy.disk_record import Record
from covey.policy.slot import SlotHeader, SlotState
from covey.types.block import BlockCodec, BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId

SHAPE = BlockShape(size_bytes=3 * 4_000, layers=3)
ROOT = BlockHash(b"")


def record(
    namespace: NamespaceId, name: BlockHash, parent: BlockHash = ROOT, *, shape: BlockShape = SHAPE,
    tenant: str = "t", codec: BlockCodec = BlockCodec.RAW,
) -> Record:  # fmt: skip
    payload = os.urandom(shape.size_bytes)
    layer = shape.size_bytes // shape.layers
    sums = tuple(xxhash.xxh3_64_intdigest(payload[at : at + layer]) for at in range(0, len(payload), layer))
    header = SlotHeader(
        state=SlotState.COMMITTED, generation=7, namespace=namespace, hash=name, shape=shape, checksums=sums,
        codec=codec,
    )  # fmt: skip
    return Record(header=header, parent=parent, tenant=TenantId(tenant), payload=payload)


def new_namespace() -> NamespaceId:
    return NamespaceId(os.urandom(16))


def new_chain(
    count: int, namespace: NamespaceId, *, parent: BlockHash = ROOT, shape: BlockShape = SHAPE,
    tenant: str = "t",
) -> list[Record]:  # fmt: skip
    """Blocks that grow from each other."""
    records: list[Record] = []
    for _ in range(count):
        name = BlockHash(os.urandom(16))
        records.append(record(namespace, name, parent, shape=shape, tenant=tenant))
        parent = name
    return records


def names(records: list[Record]) -> list[BlockHash]:
    return [each.hash for each in records]
