"""What the index takes for each block, measured: a tenth of a million in `make test`, a million in `make soak`."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from covey.policy.arena import PAGE_BYTES, Arena
from covey.policy.retention import ReuseValue
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockKey, CommitBlock, CommitRequest, LeaseRequest, LookupRequest, ReserveRequest

BLOCKS = 1_000_000 if os.environ.get("COVEY_SOAK") else 50_000
BYTES_MAX = 256
CHAIN = 500
SHAPE = BlockShape(size_bytes=2048, layers=1)


def chain(number: int) -> list[BlockHash]:
    spread = number * 0x9E3779B97F4A7C15
    return [BlockHash(((spread + i * 0xD1B54A32D192ED03) % (1 << 128)).to_bytes(16, "little")) for i in range(CHAIN)]


def fill(index: StoreIndex, number: int) -> None:
    names, tenant = chain(number), TenantId(f"t{number % 8}")
    namespace = NamespaceId(number.to_bytes(16, "big"))
    keys = tuple(BlockKey(hash=n, parent=names[i - 1] if i else BlockHash(b"")) for i, n in enumerate(names))
    grant = index.reserve(
        ReserveRequest(tenant=tenant, namespace=namespace, blocks=keys, shape=SHAPE, owner="w", ttl_s=60.0), 0.0
    ).lease
    blocks = tuple(CommitBlock(hash=name, checksums=(1,)) for name in names)
    index.can_commit(CommitRequest(tenant=tenant, lease=grant.lease, epoch=1, blocks=blocks), 0.0)
    index.commit(grant.lease, dict.fromkeys(names, 7), 0.0)
    index.release(LeaseRequest(tenant=tenant, lease=grant.lease, epoch=1), 0.0)
    index.drain_changes()


@pytest.mark.timeout(900)
def test_a_block_takes_at_most_256_bytes_of_the_index() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = StoreIndex(
            arena=Arena(2 * BLOCKS * PAGE_BYTES), epoch=1, name="s", retention=ReuseValue(),
            limits=StoreLimits(blocks_max=BLOCKS),
        )  # fmt: skip
        for number in range(BLOCKS // CHAIN):
            fill(index, number)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    stats = index.stats()
    assert stats.blocks == BLOCKS
    assert taken / BLOCKS <= BYTES_MAX
    assert 0.7 * taken <= stats.index_bytes <= BYTES_MAX * BLOCKS, "what it says of itself is about what it takes"
    names = chain(3)
    request = LookupRequest(
        tenant=TenantId("t3"), namespace=NamespaceId((3).to_bytes(16, "big")), hashes=tuple(names), owner="r",
        ttl_s=1.0, shape=SHAPE,
    )  # fmt: skip
    assert index.lookup(request, 1.0).blocks.names == tuple(names)


def test_memory_is_taken_when_blocks_come() -> None:
    index = StoreIndex(
        arena=Arena(1 << 34), epoch=1, name="s", limits=StoreLimits(blocks_max=1 << 20), retention=ReuseValue()
    )
    empty_bytes = index.stats().index_bytes
    fill(index, 1)
    assert index.stats().index_bytes - empty_bytes < 200 * CHAIN
