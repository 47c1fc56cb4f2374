"""Settings of a kvstore."""

from __future__ import annotations

from typing import Annotated

import msgspec

from covey.config import CommonConfig, NonNegative, Positive, PositiveInt
from covey.policy.store_index import StoreLimits

_DEFAULTS = StoreLimits()


class Config(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one node of the store needs to know."""

    listen: str = "127.0.0.1:0"
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
    events_kept: PositiveInt = 4096
    """Events that a watcher may lag behind before it gets a snapshot instead."""

    def limits(self) -> StoreLimits:
        return StoreLimits(
            blocks_max=self.blocks_max,
            leases_max=self.leases_max,
            lease_refs_max=self.lease_refs_max,
            lease_cap_s=self.lease_cap_s,
            pin_ttl_max_s=self.pin_ttl_max_s,
            pinned_share=self.pinned_share,
            cooling_s=self.cooling_s,
        )
