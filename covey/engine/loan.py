"""What a sequence has with another worker."""

from __future__ import annotations

from dataclasses import dataclass

from covey.types.ids import LeaseId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Borrowed:
    """Blocks of a sequence with one creditor."""

    address: str
    worker: WorkerId
    lease: LeaseId
    ttl_s: float
    blocks: int
