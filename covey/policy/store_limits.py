"""What bounds a store's index, its leases and its pins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Bounds of a store. `cooling_s` is how long a slot rests after its writer was presumed dead."""

    blocks_max: int = 1_048_576
    leases_max: int = 65_536
    lease_refs_max: int = 4_194_304
    lease_cap_s: float = 600.0
    pin_ttl_max_s: float = 3600.0
    pinned_share: float = 0.8
    """How much of the store, and of a tenant's quota, pins may hold."""
    cooling_s: float = 5.0
    quota_bytes: int = 0
    """What a tenant without a quota of its own may use; 0: no limit."""
