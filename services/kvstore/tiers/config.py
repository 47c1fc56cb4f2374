"""Settings of the tiers below memory."""

from __future__ import annotations

from typing import Annotated

import msgspec

from covey.config import Positive, PositiveInt
from covey.policy.tiering import TieringConfig

from .disk import DiskLimits
from .engine import check_url
from .remote import RemoteLimits

_REMOTE = RemoteLimits()
_TIERING = TieringConfig()

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class DiskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The disk of this node."""

    path: str = ""
    """A directory for blocks, where each node that has a name (`worker`) takes one of its own; empty: none are kept on
    disk."""
    capacity_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] = 16 << 30
    segment_bytes: Annotated[int, msgspec.Meta(ge=1 << 16)] = 64 << 20
    """Room is made by giving up whole segments: the smaller, the less goes at once."""
    blocks_max: PositiveInt = 4_194_304
    """Bounds the index in memory, at some 60 bytes a block."""
    tenant_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """What one tenant's blocks may take on disk; 0: no limit of its own."""

    def __post_init__(self) -> None:
        if 2 * self.segment_bytes > self.capacity_bytes:
            raise ValueError("segment_bytes: at least two segments must fit into capacity_bytes")

    def limits(self) -> DiskLimits:
        return DiskLimits(
            capacity_bytes=self.capacity_bytes,
            segment_bytes=self.segment_bytes,
            blocks_max=self.blocks_max,
            tenant_bytes=self.tenant_bytes,
        )


class RemoteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine that a fleet shares."""

    url: str = ""
    """`redis://`, `valkey://`, `rediss://`, `valkeys://` (with `+cluster` for one), or `s3://bucket/prefix`; empty:
    none."""
    endpoint: str = ""
    """Where an S3-compatible store listens, if it is not Amazon's."""
    credentials_file: str | None = None
    """A password, or for S3 `KEY_ID:SECRET`; without one, what the URL or the environment says."""
    timeout_s: Positive = _REMOTE.timeout_s
    """For a call that moves blocks."""
    lookup_s: Positive = _REMOTE.lookup_s
    """For all the asking of one look-up; more for object storage that is far away."""
    calls_max: PositiveInt = _REMOTE.calls_max
    breaker_failures: PositiveInt = _REMOTE.breaker_failures
    breaker_open_s: Positive = _REMOTE.breaker_open_s
    """How long an engine that failed so often in a row is left alone."""

    def __post_init__(self) -> None:
        if self.url:
            check_url(self.url)
        if self.endpoint and not self.url.startswith("s3://"):
            raise ValueError("endpoint: belongs to a url that starts with s3://")

    def limits(self) -> RemoteLimits:
        return RemoteLimits(
            timeout_s=self.timeout_s,
            lookup_s=self.lookup_s,
            calls_max=self.calls_max,
            breaker_failures=self.breaker_failures,
            breaker_open_s=self.breaker_open_s,
        )


class MoveConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When blocks move between memory and what lies below."""

    high: Share = _TIERING.high
    """Memory fuller than this has its coldest blocks copied down, ahead of eviction,"""
    low: Share = _TIERING.low
    """until all above this lie below too."""
    recompute_s_per_mib: Positive = _TIERING.recompute_s_per_mib
    """What an engine takes to compute a mebibyte of blocks at the start of a prompt."""
    depth_doubling: PositiveInt = _TIERING.depth_doubling
    """So many blocks into a prompt, computing one takes twice as long."""
    horizon_s: Positive = _TIERING.horizon_s
    """How far ahead reuse counts."""
    prior_s: Positive = _TIERING.prior_s

    def __post_init__(self) -> None:
        self.policy()

    def policy(self) -> TieringConfig:
        """Raises `ValueError` for watermarks in the wrong order."""
        return TieringConfig(
            high=self.high,
            low=self.low,
            recompute_s_per_mib=self.recompute_s_per_mib,
            depth_doubling=self.depth_doubling,
            horizon_s=self.horizon_s,
            prior_s=self.prior_s,
        )
