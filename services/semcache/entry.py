"""One stored answer and what it answers."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

from covey.errors import InvalidArgument
from covey.policy.reuse import Candidate
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.semcache import CachedAnswer, CacheOffer

OVERHEAD_BYTES = 1024
"""What an entry costs beside its texts and tokens: the object, its places in the tables."""


class Scope(NamedTuple):
    """Whose entries these are; nothing ever crosses it."""

    tenant: TenantId
    model: str


class Partition(NamedTuple):
    """The unit of quota."""

    scope: Scope
    category: str


class Shelf(NamedTuple):
    """Entries that may stand for each other: one partition, and everything but the last user turn equal."""

    partition: Partition
    context_key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stored answer; immutable. `asked_category` is what the request named, `shelf` what it was filed under."""

    id: str
    label: int
    shelf: Shelf
    asked_category: str
    exact_key: bytes
    text: str
    answer: str
    token_ids: array[int]
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stored_at: float
    expires_at: float
    size_bytes: int

    @property
    def scope(self) -> Scope:
        return self.shelf.partition.scope

    def candidate(self, similarity: float = 1.0) -> Candidate:
        """What the policy sees of this entry."""
        return Candidate(entry=self.id, text=self.text, stored_at=self.stored_at, similarity=similarity)

    def replay(self, now: float) -> CachedAnswer:
        """The answer as the gateway replays it."""
        return CachedAnswer(
            entry=self.id,
            text=self.answer,
            ids=tuple(self.token_ids),
            reason=self.reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            age_s=now - self.stored_at,
        )


def pack_ids(offer: CacheOffer) -> array[int]:
    """Token ids at four bytes each; raises `InvalidArgument` for a number that is no token id."""
    try:
        return array("I", offer.ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument("token ids lie between 0 and 2**32 - 1", field="ids") from error


def size_of(offer: CacheOffer, dim: int) -> int:
    """Bytes that an entry for `offer` is accounted with; `dim` is 0 for one without a vector."""
    texts = len(offer.text.encode()) + len(offer.query.text.encode())
    return OVERHEAD_BYTES + texts + 4 * len(offer.ids) + (6 * dim if dim else 0)
