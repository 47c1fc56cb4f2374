"""Blocks of one worker's sequence in another worker's memory (Infinite-LLM)."""

from __future__ import annotations

from dataclasses import dataclass

from covey.types.ids import LeaseId, TenantId
from covey.types.limits import bounded

LEND_CHUNK_BYTES_MAX = 2 * 1024 * 1024
LEND_BLOCKS_MAX = 65_536
ATTEND_ROWS_MAX = 256
ATTEND_BYTES_MAX = 3 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LendChunk:
    """A piece of a lent block. The first one of an upload opens the loan, of `blocks` blocks."""

    tenant: TenantId = bounded(size=128)
    owner: str = bounded(size=256)
    blocks: int = bounded(low=1, high=LEND_BLOCKS_MAX)
    index: int = bounded(low=0, high=LEND_BLOCKS_MAX)
    offset: int = bounded(low=0)
    data: bytes = bounded(size=LEND_CHUNK_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class LendReply:
    lease: LeaseId
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendRow:
    """Queries of one sequence in one layer, fp32 [token, head, head_dim]; without tokens the lease is renewed only."""

    tenant: TenantId = bounded(size=128)
    lease: LeaseId = bounded(size=128)
    tokens: int = bounded(low=0, high=65_536)
    q: bytes = bounded(size=ATTEND_BYTES_MAX, default=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendRequest:
    layer: int = bounded(low=0, high=65_536)
    rows: tuple[AttendRow, ...] = bounded(size=ATTEND_ROWS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendPart:
    """Of one row: fp32 [token, head, head_dim] and fp32 [token, head]."""

    out: bytes
    lse: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendReply:
    parts: tuple[AttendPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnRequest:
    tenant: TenantId = bounded(size=128)
    lease: LeaseId = bounded(size=128)
