"""Short calls to a store index, for its tests."""

from __future__ import annotations

from typing import Any

from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import (
    BlockKey,
    CommitBlock,
    CommitRequest,
    GrantStatus,
    LeaseGrant,
    LeaseRequest,
    LookupReply,
    LookupRequest,
    PinKind,
    PinRequest,
    ReserveReply,
    ReserveRequest,
)

T = TenantId("t")
SHAPES = {
    NamespaceId(b"n" * 16): BlockShape(size_bytes=3 * 4096, layers=3),
    NamespaceId(b"m" * 16): BlockShape(size_bytes=8192, layers=2),
}
N, M = SHAPES
CHAINS = [[BlockHash(f"{c}{i:015d}".encode()) for i in range(8)] for c in "abc"]


def keys(chain: list[BlockHash], start: int, stop: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(hash=chain[i], parent=chain[i - 1] if i else BlockHash(b"")) for i in range(start, stop))


def make(capacity: int = 16 * 4096 * 8, **limits: Any) -> StoreIndex:
    return StoreIndex(arena=Arena(capacity), epoch=7, name="s", limits=StoreLimits(**limits))


def reserve(
    index: StoreIndex, blocks: tuple[BlockKey, ...], now: float = 0.0, *, ns: NamespaceId = N, owner: str = "w",
    private: bool = False, ttl_s: float = 10.0,
) -> ReserveReply:  # fmt: skip
    return index.reserve(
        ReserveRequest(
            tenant=T, namespace=ns, blocks=blocks, shape=SHAPES[ns], owner=owner, ttl_s=ttl_s, private=private
        ),
        now,
    )


def commit(
    index: StoreIndex, lease: LeaseGrant, hashes: list[BlockHash], now: float = 0.0, *, ns: NamespaceId = N
) -> None:
    layers = SHAPES[ns].layers
    request = CommitRequest(
        tenant=T,
        lease=lease.lease,
        epoch=lease.epoch,
        blocks=tuple(CommitBlock(hash=h, checksums=(1,) * layers) for h in hashes),
    )
    slots = index.can_commit(request, now)
    index.commit(lease.lease, {slot.location.hash: 99 for slot in slots}, now)


def put(
    index: StoreIndex,
    chain: list[BlockHash],
    stop: int,
    now: float = 0.0,
    *,
    private: bool = False,
    ns: NamespaceId = N,
) -> LeaseGrant:
    reply = reserve(index, keys(chain, 0, stop), now, private=private, ns=ns)
    commit(index, reply.lease, [g.hash for g in reply.grants if g.status is GrantStatus.GRANTED], now, ns=ns)
    return reply.lease


def lookup(
    index: StoreIndex, hashes: list[BlockHash], now: float = 0.0, *, ns: NamespaceId = N, ttl_s: float = 10.0
) -> LookupReply:
    return index.lookup(
        LookupRequest(tenant=T, namespace=ns, hashes=tuple(hashes), owner="r", ttl_s=ttl_s, shape=SHAPES[ns]), now
    )


def release(index: StoreIndex, lease: LeaseGrant, now: float = 0.0, *, tenant: TenantId = T) -> None:
    index.release(LeaseRequest(tenant=tenant, lease=lease.lease, epoch=lease.epoch), now)


def pin(
    index: StoreIndex, hashes: list[BlockHash], now: float = 0.0, *, kind: PinKind = PinKind.HARD, ttl_s: float = 10.0
) -> LeaseGrant:
    return index.pin(
        PinRequest(tenant=T, namespace=N, hashes=tuple(hashes), kind=kind, ttl_s=ttl_s, owner="p"), now
    ).lease
