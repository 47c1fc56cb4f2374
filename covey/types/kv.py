"""The kvstore contract: leases, two-phase writes, reads by block, pins, events. Bytes never travel on NATS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import overload

from covey.errors import InvalidArgument
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


class KvEventKind(StrEnum):
    STORED = "STORED"
    EVICTED = "EVICTED"
    CLEARED = "CLEARED"
    PINNED = "PINNED"
    UNPINNED = "UNPINNED"
    MOVED = "MOVED"
    RECODED = "RECODED"


class Tier(StrEnum):
    """Where a node keeps a block: mapped shared memory, its own disk, or the engine that a fleet shares."""

    MEMORY = "MEMORY"
    DISK = "DISK"
    REMOTE = "REMOTE"


class BlockCodec(StrEnum):
    """How a stored payload is encoded. All but RAW lose precision and serve only readers that name them."""

    RAW = "RAW"
    FP16 = "FP16"
    INT8 = "INT8"
    PQ4 = "PQ4"
    XQUANT = "XQUANT"


class KvElement(StrEnum):
    """What a payload's numbers are. OPAQUE: bytes that no codec understands. INT8 pages end with a scale a token."""

    OPAQUE = "OPAQUE"
    FP32 = "FP32"
    FP16 = "FP16"
    INT8 = "INT8"


class AckLevel(StrEnum):
    """What has happened when a commit is answered: visible here, on `replicas` nodes, or on disk."""

    LOCAL = "LOCAL"
    REPLICATED = "REPLICATED"
    DURABLE = "DURABLE"


class TaskKind(StrEnum):
    """PREFETCH: up to memory. REPLICATE: also on other nodes. MOVE: to `to`, and away here. DEMOTE: down to `tier`.

    RECODE: encode anew, readers keep the old version. SCRUB: verify. DRAIN: move all away and refuse writes.
    """

    PREFETCH = "PREFETCH"
    REPLICATE = "REPLICATE"
    MOVE = "MOVE"
    DEMOTE = "DEMOTE"
    RECODE = "RECODE"
    SCRUB = "SCRUB"
    DRAIN = "DRAIN"


class TaskState(StrEnum):
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Geometry of a block: one header checksum (xxh3-64) per layer, `size_bytes` of payload, layer-major.

    What lossy codecs need to know: a layer is [2 (K, V), kv_heads] pages of `tokens` tokens; a page of keys is
    [head_dim, tokens], one of values [tokens, head_dim].
    """

    size_bytes: int = bounded(low=1, high=1 << 30)
    layers: int = bounded(low=1, high=4096)
    element: KvElement = KvElement.OPAQUE
    kv_heads: int = bounded(low=0, high=4096, default=0)
    head_dim: int = bounded(low=0, high=4096, default=0)
    tokens: int = bounded(low=0, high=4096, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseGrant:
    """A bounded right to read or write; `epoch` fences a holder that was presumed dead."""

    lease: LeaseId
    epoch: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLocation:
    """Where a committed block is: a slot of this node's arena. `generation` changes whenever the slot is reused."""

    hash: BlockHash
    offset: int
    generation: int
    digest: int
    codec: BlockCodec = BlockCodec.RAW
    size_bytes: int = 0
    """Size of an encoded payload; 0 for RAW, whose size is the shape's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLocations(Sequence[BlockLocation]):
    """Locations as columns, little-endian: a reply of a thousand of them is five fields, and each is built when asked.

    `codecs` (numbers of `BlockCodec` on the wire) and `sizes` are empty when every block is RAW.
    """

    hashes: bytes = b""
    offsets: bytes = b""
    generations: bytes = b""
    digests: bytes = b""
    codecs: bytes = b""
    sizes: bytes = b""

    def __post_init__(self) -> None:
        count = len(self.offsets) // 8
        wide = (len(self.hashes), 2 * len(self.generations), 2 * len(self.digests)) == (16 * count,) * 3
        encoded = (len(self.codecs), len(self.sizes)) in {(0, 0), (count, 8 * count)}
        if not (wide and encoded and len(self.offsets) == 8 * count):
            raise InvalidArgument("columns of locations have different lengths", field="blocks")
        if self.codecs and not 1 <= min(self.codecs) <= max(self.codecs) <= len(BlockCodec):
            raise InvalidArgument("a codec is unknown", field="blocks.codecs")

    def __len__(self) -> int:
        return len(self.offsets) // 8

    @overload
    def __getitem__(self, i: int) -> BlockLocation: ...

    @overload
    def __getitem__(self, i: slice) -> BlockLocations: ...

    def __getitem__(self, i: int | slice) -> BlockLocation | BlockLocations:
        if isinstance(i, slice):
            return self._part(*i.indices(len(self)))
        at = i + len(self) if i < 0 else i
        if not 0 <= at < len(self):
            raise IndexError(i)
        return BlockLocation(
            hash=BlockHash(self.hashes[16 * at : 16 * at + 16]),
            offset=int.from_bytes(self.offsets[8 * at : 8 * at + 8], "little"),
            generation=int.from_bytes(self.generations[8 * at : 8 * at + 8], "little"),
            digest=int.from_bytes(self.digests[8 * at : 8 * at + 8], "little"),
            codec=_CODECS[self.codecs[at] - 1] if self.codecs else BlockCodec.RAW,
            size_bytes=int.from_bytes(self.sizes[8 * at : 8 * at + 8], "little") if self.sizes else 0,
        )

    @property
    def names(self) -> tuple[BlockHash, ...]:
        """The hashes, in order."""
        data = self.hashes
        return tuple(BlockHash(data[at : at + 16]) for at in range(0, len(data), 16))

    def _part(self, start: int, stop: int, step: int) -> BlockLocations:
        if step != 1:
            raise ValueError("locations are cut without steps")
        wide = slice(8 * start, 8 * max(start, stop))
        return BlockLocations(
            hashes=self.hashes[2 * wide.start : 2 * wide.stop],
            offsets=self.offsets[wide],
            generations=self.generations[wide],
            digests=self.digests[wide],
            codecs=self.codecs[start : max(start, stop)],
            sizes=self.sizes[wide],
        )


_CODECS = tuple(BlockCodec)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTask:
    """Work on stored blocks that takes its time. Which fields count depends on `kind`; empty `hashes`: all of them."""

    kind: TaskKind
    tenant: TenantId = bounded(size=128, default=TenantId(""))
    namespace: NamespaceId = bounded(size=32, default=NamespaceId(b""))
    hashes: tuple[BlockHash, ...] = bounded(size=HASHES_MAX, default=())
    tier: Tier = Tier.DISK
    codec: BlockCodec = BlockCodec.RAW
    to: WorkerId = bounded(size=128, default=WorkerId(""))
    replicas: int = bounded(low=0, high=16, default=0)
    deadline_s: float = bounded(low=0, high=3600, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    task: str = bounded(size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """`done` of `total` blocks; `why` when it failed, or what it found."""

    task: str
    kind: TaskKind
    state: TaskState
    done: int = 0
    total: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRequest:
    """Ask for a tenant's quota at this node, or set it with `quota_bytes` (0: no limit)."""

    tenant: TenantId = bounded(size=128)
    quota_bytes: int | None = bounded(low=0, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaReply:
    tenant: TenantId
    quota_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    tier: Tier
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    writable: bool = True
    why: str = ""
    """What is in the way of writing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    leases: int = 0
    leased_blocks: int = 0
    pinned_blocks: int = 0
    pinned_bytes: int = 0
    reserved_blocks: int = 0
    private_blocks: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    quarantined: int = 0
    index_bytes: int = 0
    tiers: tuple[TierStats, ...] = ()
    ring_version: int = 0
    ring_nodes: int = 0
    copied_blocks: int = 0
    """Blocks that this node has put on other nodes, as replicas or because they own them now."""
    dropped_blocks: int = 0
    """Blocks given up because other nodes own them now and have them."""
    waiting_blocks: int = 0
    """Blocks still to be looked at by a copy that is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchKvRequest:
    """Events after (`epoch`, `seq`); when that is too old or of another epoch, the stream starts with a snapshot."""

    epoch: int = bounded(low=0, default=0)
    seq: int = bounded(low=0, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvent:
    """Blocks appeared or went at `worker`; sequence numbers have no gaps within an epoch."""

    epoch: int
    seq: int
    schema: int
    worker: WorkerId
    kind: KvEventKind
    namespace: NamespaceId
    hashes: tuple[BlockHash, ...] = bounded(size=HASHES_MAX, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSnapshotEntry:
    namespace: NamespaceId
    hashes: tuple[BlockHash, ...] = bounded(size=HASHES_MAX, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSnapshot:
    """A part of what a worker holds; all parts, and the events after (`epoch`, `seq`), say what there is."""

    epoch: int
    seq: int
    worker: WorkerId
    entries: tuple[KvSnapshotEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RingMember:
    """A node that owns blocks; another `epoch` is another life of it, with an empty memory."""

    worker: WorkerId = bounded(size=128)
    epoch: int = 0
    host: str = ""
    capacity_bytes: int = bounded(low=0, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingVersion:
    """Who owns blocks, as agreed: versions only grow; two of the same number are ordered by their proposers' names."""

    version: int = bounded(low=1)
    proposer: WorkerId = bounded(size=128)
    replicas: int = bounded(low=1, high=16, default=1)
    members: tuple[RingMember, ...] = bounded(size=1024, default=())
