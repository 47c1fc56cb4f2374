"""What a store says of itself, and what it can be told to do: tasks, quotas, counts, events, the ring."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, NamespaceId, TenantId, WorkerId
from covey.types.kv import HASHES_MAX
from covey.types.limits import bounded


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
