"""The kvstore contract: leases, two-phase writes, reads by block, pins, events. Bytes never travel on NATS."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from covey.types.block import BlockCodec, BlockLocations, BlockShape
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId, WorkerId
from covey.types.limits import bounded

HASHES_MAX = 65536
CHUNK_BYTES_MAX = 2 * 1024 * 1024
LEASE_TTL_MAX_S = 600.0


class GrantStatus(StrEnum):
    GRANTED = "GRANTED"
    EXISTS = "EXISTS"
    PENDING = "PENDING"


class PinKind(StrEnum):
    SOFT = "SOFT"
    HARD = "HARD"


class AckLevel(StrEnum):
    """What has happened when a commit is answered: visible here, on `replicas` nodes, or on disk."""

    LOCAL = "LOCAL"
    REPLICATED = "REPLICATED"
    DURABLE = "DURABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseGrant:
    """A bounded right to read or write; `epoch` fences a holder that was presumed dead."""

    lease: LeaseId
    epoch: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupRequest:
    """Find the longest stored prefix of `hashes` and lease it to `owner`."""

    tenant: TenantId = bounded(size=128)
    namespace: NamespaceId = bounded(size=32)
    hashes: tuple[BlockHash, ...] = bounded(size=HASHES_MAX)
    owner: str = bounded(size=128)
    ttl_s: float = bounded(low=0.01, high=LEASE_TTL_MAX_S)
    shape: BlockShape
    codecs: tuple[BlockCodec, ...] = bounded(size=8, default=())
    """Lossy codecs that the reader takes besides RAW; a block in another one ends the prefix."""
    wait_s: float = bounded(low=0, high=60, default=0.0)
    """How long the node may take to bring blocks up from lower tiers before it answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupReply:
    """`blocks` is prefix-closed within the hashes that were asked; no lease when it is empty.

    `cold_blocks` further blocks lie in lower tiers; to bring them up would take about `load_s`.
    """

    blocks: BlockLocations = BlockLocations()
    lease: LeaseGrant | None = None
    cold_blocks: int = 0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKey:
    """A block to write and the block it grows from (empty for the first of a chain)."""

    hash: BlockHash = bounded(size=32)
    parent: BlockHash = bounded(size=32, default=BlockHash(b""))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveRequest:
    """Phase one of a write. `private` blocks belong to one request and vanish with their last lease.

    With a `codec`, the payloads that will be written are encoded already and have `encoded_bytes` each; `shape` is
    that of the blocks before.
    """

    tenant: TenantId = bounded(size=128)
    namespace: NamespaceId = bounded(size=32)
    blocks: tuple[BlockKey, ...] = bounded(size=HASHES_MAX)
    shape: BlockShape
    owner: str = bounded(size=128)
    ttl_s: float = bounded(low=0.01, high=LEASE_TTL_MAX_S)
    private: bool = False
    codec: BlockCodec = BlockCodec.RAW
    encoded_bytes: int = bounded(low=0, high=1 << 30, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One block's answer: GRANTED a slot, EXISTS already, or PENDING on another writer."""

    hash: BlockHash
    status: GrantStatus
    offset: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveReply:
    """`lease` covers the granted slots until Commit, and the committed and existing blocks after it."""

    lease: LeaseGrant
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteChunk:
    """A piece of a block for a granted slot, for writers that cannot map the arena."""

    tenant: TenantId = bounded(size=128, default=TenantId(""))
    lease: LeaseId = bounded(size=128)
    hash: BlockHash = bounded(size=32)
    offset: int = bounded(low=0)
    data: bytes | memoryview = bounded(size=CHUNK_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReply:
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitBlock:
    """`checksums`: xxh3-64 of each layer's payload, as written to the slot's header."""

    hash: BlockHash = bounded(size=32)
    checksums: tuple[int, ...] = bounded(size=4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Phase two: make the blocks visible. Fenced when `epoch` is not the reservation's."""

    tenant: TenantId = bounded(size=128, default=TenantId(""))
    lease: LeaseId = bounded(size=128)
    epoch: int
    blocks: tuple[CommitBlock, ...] = bounded(size=HASHES_MAX)
    ack: AckLevel = AckLevel.LOCAL


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReply:
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """Release or abort a lease; `tenant` and `epoch` must be the grant's."""

    tenant: TenantId = bounded(size=128, default=TenantId(""))
    lease: LeaseId = bounded(size=128)
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewRequest:
    """Extend a lease by showing progress: `done` blocks must have grown since the last renewal."""

    tenant: TenantId = bounded(size=128, default=TenantId(""))
    lease: LeaseId = bounded(size=128)
    epoch: int
    done: int = bounded(low=0)
    ttl_s: float = bounded(low=0.01, high=LEASE_TTL_MAX_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class GetRequest:
    """Stream leased blocks, layers `first_layer` to `last_layer` (0: to the end).

    `by_layer`: first the first layer of every block, then the second of every block, and so on.
    """

    tenant: TenantId = bounded(size=128, default=TenantId(""))
    lease: LeaseId = bounded(size=128)
    hashes: tuple[BlockHash, ...] = bounded(size=HASHES_MAX)
    first_layer: int = bounded(low=0, default=0)
    last_layer: int = bounded(low=0, default=0)
    by_layer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChunk:
    """A piece of a block; the first piece of each block carries the checksums of its layers."""

    hash: BlockHash
    offset: int
    data: bytes | memoryview
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PinRequest:
    """Keep blocks from eviction for `ttl_s`; pins always expire. `lease` in the reply releases it earlier."""

    tenant: TenantId = bounded(size=128)
    namespace: NamespaceId = bounded(size=32)
    hashes: tuple[BlockHash, ...] = bounded(size=HASHES_MAX)
    kind: PinKind = PinKind.SOFT
    ttl_s: float = bounded(low=0.01, high=3600)
    owner: str = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class PinReply:
    lease: LeaseGrant
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRequest:
    """A reader found a block bad: it becomes a miss, is counted, and is never served again."""

    tenant: TenantId = bounded(size=128)
    namespace: NamespaceId = bounded(size=32)
    hash: BlockHash = bounded(size=32)
    reason: str = bounded(size=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """How to reach a node's bytes. Same host: `probe_path` holds `probe_nonce` and boot ids agree.

    Other hosts: `bulk_address`, a plain TCP channel (empty: gRPC only).
    """

    worker: WorkerId
    arena_path: str
    arena_bytes: int
    boot_id: str
    probe_path: str
    probe_nonce: str
    bulk_address: str = ""
