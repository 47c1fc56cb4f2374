"""Settings of a kvstore."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from covey.config import CommonConfig, NonNegative, Positive, PositiveInt, TenantConfig
from covey.net.kv.copier import CopyLimits
from covey.policy.retention import LeastRecentlyUsed, RecomputeCost, Retention, ReuseValue
from covey.policy.ring import RingLimits
from covey.policy.store_index import StoreLimits
from covey.types.ids import TenantId

from .bulk import BulkLimits
from .codecs import CodecSettings
from .tiers.config import DiskConfig, MoveConfig, RemoteConfig

_DEFAULTS = StoreLimits()
_COPIES = CopyLimits()
_RING = RingLimits()


class Config(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one node of the store needs to know."""

    listen: str = "127.0.0.1:0"
    bulk_listen: str | None = None
    """Where blocks travel over plain TCP, for clients on other hosts: by default any port beside `listen`; empty: over
    gRPC only."""
    bulk_connections_max: PositiveInt = 64
    """More at a time are refused as overloaded."""
    bulk_stall_s: Positive = 30.0
    """How long a bulk connection may stand still in the middle of an exchange before it is closed."""
    capacity_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] = 1 << 30
    """Size of the arena. Its pages are taken when blocks come, not at start."""
    arena_dir: str | None = None
    """A directory on a tmpfs that engines on this host share; by default our own in shared memory, else `run_dir`."""
    blocks_max: PositiveInt = _DEFAULTS.blocks_max
    leases_max: PositiveInt = _DEFAULTS.leases_max
    lease_refs_max: PositiveInt = _DEFAULTS.lease_refs_max
    lease_cap_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = _DEFAULTS.lease_cap_s
    """No lease is renewed past this age."""
    pin_ttl_max_s: Positive = _DEFAULTS.pin_ttl_max_s
    pinned_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = _DEFAULTS.pinned_share
    """How much of the arena pins may hold."""
    cooling_s: NonNegative = _DEFAULTS.cooling_s
    """How long a slot rests after its writer was presumed dead."""
    eviction: Literal["reuse", "lru"] = "reuse"
    """What goes first where room is needed: what is least worth keeping (chance of reuse × cost of computing it again ÷
    bytes), or what was not used for the longest time."""
    reuse_horizon_s: Positive = 600.0
    """Within what time a reuse counts."""
    recompute_s: Positive = 0.02
    """How long an engine takes to compute a block again, its attention to earlier blocks aside."""
    tenants: dict[str, TenantConfig] = msgspec.field(default_factory=dict)
    """`kv_quota_bytes` of each: what its blocks may take of this node."""
    quota_bytes: Annotated[int, msgspec.Meta(ge=0)] = _DEFAULTS.quota_bytes
    """What a tenant without a quota of its own may take of this node; 0 for no limit."""
    scrub_bytes_per_s: Annotated[int, msgspec.Meta(ge=0)] = 8 << 20
    """Pace at which stored blocks are read and verified when nobody asks; 0 for not at all."""
    codecs: CodecSettings = CodecSettings()
    """How blocks are encoded."""
    disk: DiskConfig = DiskConfig()
    """Blocks on this node's disk."""
    remote: RemoteConfig = RemoteConfig()
    """Blocks in an engine that a fleet shares."""
    move: MoveConfig = MoveConfig()
    """When blocks move between memory and what lies below."""
    events_kept: PositiveInt = 4096
    """Events that a watcher may lag behind before it gets a snapshot instead."""

    replicas: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    """On how many nodes each block is, on different hosts where there are several. Set it alike on all nodes."""
    copy_bytes_per_s: Positive = _COPIES.bytes_per_s
    """Pace at which blocks are copied and moved to other nodes."""
    copy_timeout_s: Positive = _COPIES.timeout_s
    """How long one batch of at most 8 MiB may take on its way to another node."""
    ring_join_s: NonNegative = _RING.join_s
    """How long a node must be there before it owns blocks; doubled each time that it went away."""
    ring_leave_s: NonNegative = _RING.leave_s
    """How long a node must be missing before others own its blocks."""

    def copy_limits(self) -> CopyLimits:
        return CopyLimits(timeout_s=self.copy_timeout_s, bytes_per_s=self.copy_bytes_per_s)

    def ring_limits(self) -> RingLimits:
        return RingLimits(join_s=self.ring_join_s, leave_s=self.ring_leave_s)

    def bulk_address(self) -> str:
        """Where to listen for blocks over plain TCP; empty for nowhere."""
        if self.bulk_listen is None:
            return f"{self.listen.rpartition(':')[0] or '127.0.0.1'}:0"
        return self.bulk_listen

    def bulk_limits(self) -> BulkLimits:
        return BulkLimits(connections_max=self.bulk_connections_max, stall_s=self.bulk_stall_s)

    def limits(self) -> StoreLimits:
        return StoreLimits(
            blocks_max=self.blocks_max,
            leases_max=self.leases_max,
            lease_refs_max=self.lease_refs_max,
            lease_cap_s=self.lease_cap_s,
            pin_ttl_max_s=self.pin_ttl_max_s,
            pinned_share=self.pinned_share,
            cooling_s=self.cooling_s,
            quota_bytes=self.quota_bytes,
        )

    def retention(self) -> Retention:
        """What decides which blocks go first."""
        if self.eviction == "lru":
            return LeastRecentlyUsed()
        return ReuseValue(cost=RecomputeCost(block_s=self.recompute_s), horizon_s=self.reuse_horizon_s)

    def quotas(self) -> dict[TenantId, int]:
        """Bytes that tenants may take."""
        named = ((TenantId(name), tenant.kv_quota_bytes) for name, tenant in self.tenants.items())
        return {name: quota_bytes for name, quota_bytes in named if quota_bytes is not None}
